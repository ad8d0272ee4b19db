"""Frozen layers with adapters, several in one autograd function, with input gradients in FP8.

A library that fuses a layer with its adapter, or a whole MLP, has no module in between that could
be an `Fp8BackwardLinear`. These are fused functions whose input gradient is in FP8. For layers i of
one input:

    y_i  = x W_i^T + s_i (x A_i^T) B_i^T
    dx   = [dy_1 .. dy_n] [W_1; ..; W_n] + sum_i s_i (dy_i B_i) A_i
    dA_i = s_i (dy_i B_i)^T x
    dB_i = s_i dy_i^T (x A_i^T)

The first product of dx is in float8 (e4m3), with one scale for each row of either factor, and gives
bfloat16; all else has the input's dtype. An MLP computes the input of its down projection a second
time in the backward pass instead of keeping it.

Shape letters: M tokens, N outputs of a layer, K inputs, R rank, S the sum of the ranks of layers of
one input.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from qwen3_distill.training.fp8_base import Rowwise, quantize_rows, rowwise_product

AddProduct: TypeAlias = Callable[[Tensor, Tensor, Tensor, float], Any]
"""Adds the fourth argument times the product of the second and the third to the first, in place."""


class Adapted(NamedTuple):
    """A frozen layer and its adapter."""

    weight_NK: Tensor
    down_RK: Tensor
    up_NR: Tensor
    scaling: float


class Kernels(NamedTuple):
    """Holds the functions between the products."""

    add_product: AddProduct
    activate: Callable[[Tensor, Tensor], Tensor]
    """From the outputs of gate and up, [B, T, N] each, to silu(gate) * up."""
    activate_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """From the gradient of that product and the outputs of gate and up, [M, N] each, to the
    product, up's gradient and gate's. It may overwrite what it is given."""


class Turned(nn.Module):
    """Holds the transposed weights of layers of one input, side by side, in float8.

    Args:
        weights_NK: the layers' weights.
    """

    values: Tensor
    """[K, sum of N] float8."""
    scales: Tensor
    """[K, 1] float32."""

    def __init__(self, weights_NK: Sequence[Tensor]) -> None:
        super().__init__()
        turned = quantize_rows(torch.cat([weight.detach() for weight in weights_NK]).t())
        self.register_buffer("values", turned.values, persistent=False)
        self.register_buffer("scales", turned.scales, persistent=False)


def adapted_outputs(
    x: Tensor, layers: Sequence[Adapted], turned: Turned, kernels: Kernels
) -> tuple[Tensor, ...]:
    """Compute the outputs of layers of one input, [..., N] each, from [..., K]."""
    outputs: Any = _Outputs.apply(
        x, turned.values, turned.scales, kernels.add_product, *_flat(layers)
    )
    return outputs


def adapted_mlp(
    x: Tensor, layers: Sequence[Adapted], gate_up: Turned, down: Turned, kernels: Kernels
) -> Tensor:
    """Compute the output of an MLP, [B, T, K], from its input.

    Args:
        layers: gate, up and down.
    """
    y: Any = _Mlp.apply(
        x, gate_up.values, gate_up.scales, down.values, down.scales, *kernels, *_flat(layers)
    )
    return y


def _flat(layers: Sequence[Adapted]) -> list[Any]:
    # A compiler follows tensors that are arguments themselves, not those in an argument.
    return [part for layer in layers for part in layer]


def _layers(parts: Sequence[Any]) -> list[Adapted]:
    return [Adapted(*parts[start : start + 4]) for start in range(0, len(parts), 4)]


class _Outputs(torch.autograd.Function):
    """Computes the outputs of layers of one input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, scales: Tensor, add_product: AddProduct, *parts: Any
    ) -> tuple[Tensor, ...]:
        layers = _layers(parts)
        x_MK = x.reshape(-1, x.shape[-1])
        low_MS = _low(x_MK, layers)
        ctx.save_for_backward(x, low_MS, values, scales, *_adapter_matrices(layers))
        ctx.constants = (add_product, [layer.scaling for layer in layers])
        outputs = _outputs(x_MK, low_MS, layers, add_product)
        # Views: PyTorch 2.11 compiles a tensor that was changed in place to one without a gradient.
        return tuple(y_MN.view(*x.shape[:-1], y_MN.shape[-1]) for y_MN in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, low_MS, values, scales, *matrices = ctx.saved_tensors
        add_product, scalings = ctx.constants
        x_MK = x.reshape(-1, x.shape[-1])
        dys_MN = [dy.reshape(-1, dy.shape[-1]) for dy in gradients]
        back = _Back.of(dys_MN, _adapters(matrices, scalings, x.dtype))
        dx_MK = back.input_gradient(Rowwise(values, scales), add_product)
        return dx_MK.view(x.shape), None, None, None, *back.of_parts(x_MK, low_MS)


class _Mlp(torch.autograd.Function):
    """Computes an MLP, of which it keeps the input and the outputs of gate and up."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up_values: Tensor,
        gate_up_scales: Tensor,
        down_values: Tensor,
        down_scales: Tensor,
        add_product: AddProduct,
        activate: Callable[..., Tensor],
        activate_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
        *parts: Any,
    ) -> Tensor:
        *gate_up, down = layers = _layers(parts)
        x_MK = x.reshape(-1, x.shape[-1])
        low_MS = _low(x_MK, gate_up)
        gate_MN, up_MN = _outputs(x_MK, low_MS, gate_up, add_product)
        inner = (*x.shape[:-1], gate_MN.shape[-1])
        product_MN = activate(gate_MN.view(inner), up_MN.view(inner)).view(gate_MN.shape)
        down_low_MR = _low(product_MN, [down])
        (y_MK,) = _outputs(product_MN, down_low_MR, [down], add_product)
        kept = (x, gate_MN, up_MN, low_MS, down_low_MR)
        turned = (gate_up_values, gate_up_scales, down_values, down_scales)
        ctx.save_for_backward(*kept, *turned, *_adapter_matrices(layers))
        ctx.constants = (add_product, activate_backward, [layer.scaling for layer in layers])
        return y_MK.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_MN, up_MN, low_MS, down_low_MR, *saved = ctx.saved_tensors
        gate_up, down = Rowwise(*saved[:2]), Rowwise(*saved[2:4])
        add_product, activate_backward, scalings = ctx.constants
        adapters = _adapters(saved[4:], scalings, x.dtype)
        x_MK = x.reshape(-1, x.shape[-1])
        behind = _Back.of([gradients[0].reshape(x_MK.shape)], adapters[2:])
        dproduct_MN = behind.input_gradient(down, add_product)
        product_MN, dup_MN, dgate_MN = activate_backward(dproduct_MN, gate_MN, up_MN)
        back = _Back.of([dgate_MN, dup_MN], adapters[:2])
        dx = back.input_gradient(gate_up, add_product).view(x.shape)
        of_layers = [*back.of_parts(x_MK, low_MS), *behind.of_parts(product_MN, down_low_MR)]
        return dx, *[None] * 7, *of_layers


class _Adapter(NamedTuple):
    down_RK: Tensor
    up_NR: Tensor
    scaling: float


class _Back(NamedTuple):
    """Holds what comes back to layers of one input: their outputs' gradients, and their adapters'.

    The adapters are side by side: S is the sum of their ranks. A product with one of them takes as
    long as it takes to read the input, so there is one for all.
    """

    dys_MN: Sequence[Tensor]
    back_MS: Tensor
    """Gradients inside the adapters: s_i dy_i B_i."""
    down_SK: Tensor
    adapters: Sequence[_Adapter]

    @classmethod
    def of(cls, dys_MN: Sequence[Tensor], adapters: Sequence[_Adapter]) -> "_Back":
        inside = [(dy @ a.up_NR) * a.scaling for dy, a in zip(dys_MN, adapters, strict=True)]
        down_SK = torch.cat([adapter.down_RK for adapter in adapters])
        return cls(dys_MN, torch.cat(inside, dim=-1), down_SK, adapters)

    def input_gradient(self, turned: Rowwise, add_product: AddProduct) -> Tensor:
        """Compute [M, K]: the frozen layers' part in float8, the adapters' on top."""
        dtype = self.dys_MN[0].dtype
        dx_MK = rowwise_product(quantize_rows(*self.dys_MN), turned, dtype)
        add_product(dx_MK, self.back_MS, self.down_SK, 1.0)
        return dx_MK

    def of_parts(self, x_MK: Tensor, low_MS: Tensor) -> list[Tensor | None]:
        """Compute gradients of the layers' parts, as `_flat` has them: of the adapters alone.

        Args:
            low_MS: what `_low` gave in the forward pass.
        """
        ranks = [adapter.down_RK.shape[0] for adapter in self.adapters]
        d_downs_RK = (self.back_MS.t() @ x_MK).split(ranks)
        lows_MR = low_MS.split(ranks, dim=-1)
        gradients: list[Tensor | None] = []  # a compiler does not follow list[...]()
        for dy_MN, low_MR, d_down_RK, adapter in zip(
            self.dys_MN, lows_MR, d_downs_RK, self.adapters, strict=True
        ):
            gradients += [None, d_down_RK, dy_MN.t() @ (low_MR * adapter.scaling), None]
        return gradients


def _adapter_matrices(layers: Sequence[Adapted]) -> list[Tensor]:
    return [matrix for layer in layers for matrix in (layer.down_RK, layer.up_NR)]


def _adapters(
    matrices: Sequence[Tensor], scalings: Sequence[float], dtype: torch.dtype
) -> list[_Adapter]:
    downs, ups = matrices[::2], matrices[1::2]
    return [
        _Adapter(down_RK.to(dtype), up_NR.to(dtype), scaling)
        for down_RK, up_NR, scaling in zip(downs, ups, scalings, strict=True)
    ]


def _low(x_MK: Tensor, layers: Sequence[Adapted]) -> Tensor:
    """Compute x A^T of every layer, side by side: [M, S]."""
    return x_MK @ torch.cat([layer.down_RK.to(x_MK.dtype) for layer in layers]).t()


def _outputs(
    x_MK: Tensor, low_MS: Tensor, layers: Sequence[Adapted], add_product: AddProduct
) -> list[Tensor]:
    outputs = []
    lows_MR = low_MS.split([layer.down_RK.shape[0] for layer in layers], dim=-1)
    for layer, low_MR in zip(layers, lows_MR, strict=True):
        y_MN = x_MK @ layer.weight_NK.t()
        add_product(y_MN, low_MR, layer.up_NR.to(x_MK.dtype).t(), layer.scaling)
        outputs.append(y_MN)
    return outputs
