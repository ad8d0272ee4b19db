"""Frozen linear layers in FP8: the base under LoRA adapters, forward and for the input gradient.

A frozen layer takes part in two matrix products, y = x W^T and dx = dy W. Both, or the second
alone, run in float8 (e4m3) with one scale per row of either factor, so a large value costs the
precision of its own row only. W and W^T are two matrices here, because the rows of one are not
those of the other. Adapters and everything else keep their dtype. Weights that leave the learner
are merged on top of the original ones.

Rounding the forward pass changes the function that is trained: the weights' rounding and that of
the layers' inputs add to its error. Rounding the gradient's product alone leaves the function.

Shape letters: M tokens, N outputs, K inputs.
"""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.stored_weights import StoredWeights
from qwen3_distill.training.finite import remedy
from qwen3_distill.training.gradient_probe import Probe, gradient_gap

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_SMALLEST_SCALE = 1e-12
_MULTIPLE = 16
"""Inputs and outputs of a layer must be multiples of this for the device's FP8 products."""
_LARGEST_GAP = {"fp8_backward": 0.5, "fp8": 10.0}
"""`gradient_gap` to layers as loaded with which they are used. Rounding in the backward pass gives
0.11 in the lab student and 0.16 in 36 random layers, a matrix that is computed wrong about 1.
Rounding both ways gives 0.27 and 1.2, among which a wrong matrix does not show
(benchmarks/results/fp8_gradient.json)."""
_FIRST_CAPABILITY = (8, 9)
"""CUDA compute capability from which there are FP8 products (Ada, Hopper, Blackwell)."""


class Rowwise(NamedTuple):
    """A matrix in float8, with a scale for each row."""

    values: Tensor
    """[rows, columns] float8 e4m3."""
    scales: Tensor
    """[rows, 1] float32: the matrix is values * scales."""


def quantize_rows(*parts: Tensor) -> Rowwise:
    """Round a matrix to float8; the largest magnitude of each row becomes float8's largest.

    Args:
        parts: matrices that stand side by side in it.
    """
    largest = torch.cat([part.abs().amax(dim=-1, keepdim=True) for part in parts], dim=-1)
    scales = largest.amax(dim=-1, keepdim=True).float().clamp(min=_SMALLEST_SCALE) / _LARGEST
    # Rounding of the division may exceed the largest value, which the cast would turn into NaN.
    scaled = [(part.float() / scales).clamp(-_LARGEST, _LARGEST).to(_FP8) for part in parts]
    whole = scaled[0].contiguous() if len(scaled) == 1 else torch.cat(scaled, dim=-1)
    return Rowwise(whole, scales)


def rowwise_product(left: Rowwise, right: Rowwise, dtype: torch.dtype) -> Tensor:
    """[rows of left, rows of right]: left right^T."""
    # The device's rowwise products give bfloat16 only.
    product: Tensor = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        left.values,
        right.values.t(),
        scale_a=left.scales,
        scale_b=right.scales.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product.to(dtype)


class _RoundedProduct(torch.autograd.Function):
    """x W^T for a frozen W, rounded both ways: only x gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MK: Tensor,
        weight: Tensor,
        scales: Tensor,
        turned: Tensor,
        turned_scales: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(turned, turned_scales)
        ctx.dtype = x_MK.dtype
        return rowwise_product(quantize_rows(x_MK), Rowwise(weight, scales), dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _input_gradient(ctx, gradients[0]), None, None, None, None, None


class _ExactForward(torch.autograd.Function):
    """x W^T for a frozen W, of which the gradient's product alone is rounded."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MK: Tensor,
        weight_NK: Tensor,
        turned: Tensor,
        turned_scales: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(turned, turned_scales)
        ctx.dtype = x_MK.dtype
        return F.linear(x_MK.to(dtype), weight_NK.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _input_gradient(ctx, gradients[0]), None, None, None, None


def _input_gradient(ctx: Any, dy_MN: Tensor) -> Tensor:
    return rowwise_product(quantize_rows(dy_MN), Rowwise(*ctx.saved_tensors), ctx.dtype)


class _FrozenLinear(nn.Module):
    """Holds the transposed weight in float8, which both kinds of frozen layer need."""

    turned: Tensor
    turned_scales: Tensor

    def __init__(self, weight_NK: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape
        turned = quantize_rows(weight_NK.detach().t().contiguous())
        self.register_buffer("turned", turned.values, persistent=False)
        self.register_buffer("turned_scales", turned.scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] from [..., K], in the dtype of any other linear layer here."""
        device = x.device.type
        autocasts = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocasts else x.dtype
        y_MN = self._product(x.reshape(-1, self.in_features), dtype)
        return y_MN.view(*x.shape[:-1], self.out_features)

    def _product(self, x_MK: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError


class Fp8Linear(_FrozenLinear):
    """A frozen linear layer without bias, in float8 forward and backward.

    Args:
        weight_NK: the layer's weight.
        name: its name in ``stored``.
        stored: the files it was loaded from.
    """

    weight: Tensor
    scales: Tensor

    def __init__(self, weight_NK: Tensor, name: str, stored: StoredWeights) -> None:
        super().__init__(weight_NK)
        self._name, self._stored, self._dtype = name, stored, weight_NK.dtype
        straight = quantize_rows(weight_NK.detach())
        self.register_buffer("weight", straight.values, persistent=False)
        self.register_buffer("scales", straight.scales, persistent=False)

    @property
    def original_bytes(self) -> int:
        """Number of bytes of `original`."""
        return self.weight.numel() * self._dtype.itemsize

    def original(self) -> Tensor:
        """[N, K]: the weight before it was rounded, read from the model's files."""
        return self._stored.load(self._name, device=self.weight.device, dtype=self._dtype)

    def _product(self, x_MK: Tensor, dtype: torch.dtype) -> Tensor:
        y_MN: Any = _RoundedProduct.apply(
            x_MK, self.weight, self.scales, self.turned, self.turned_scales, dtype
        )
        return y_MN


class Fp8BackwardLinear(_FrozenLinear):
    """A frozen linear layer without bias, of which the input gradient alone is in float8.

    The loss is that of the unrounded model, and rounding enters the gradient once per layer.

    Args:
        weight: the layer's weight.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight)
        self.weight = weight

    def _product(self, x_MK: Tensor, dtype: torch.dtype) -> Tensor:
        y_MN: Any = _ExactForward.apply(x_MK, self.weight, self.turned, self.turned_scales, dtype)
        return y_MN


def freeze_in_fp8(
    core: PreTrainedModel,
    model_dir: Path,
    precision: Literal["fp8", "fp8_backward"],
    done: Collection[str] = (),
) -> None:
    """Replace the frozen layer under every adapter by an `Fp8Linear` or `Fp8BackwardLinear`.

    Args:
        done: names of layers with adapters that are to stay as they are.

    Raises:
        ConfigError: the device has no FP8 products, or a layer's sizes do not fit them.
    """
    check_fp8_layers(core, precision)
    stored = StoredWeights(model_dir)
    for name, module in core.named_modules():
        if not isinstance(module, LoraLayer) or name in done:
            continue
        base: Any = module.base_layer
        if precision == "fp8":
            module.base_layer = Fp8Linear(base.weight, f"{name}.weight", stored)
        else:
            module.base_layer = Fp8BackwardLinear(base.weight)


def check_fp8_layers(core: PreTrainedModel, precision: Literal["fp8", "fp8_backward"]) -> None:
    """Check that the layers under adapters can be computed in FP8 where they are.

    Raises:
        ConfigError: the device has no FP8 products, or a layer's sizes do not fit them.
    """
    setting = f"training.base_precision={precision}"
    _check_device(core.device, setting)
    for name, module in core.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        base: Any = module.base_layer
        if base.bias is not None:
            raise ConfigError(f"{setting}: {name} has a bias; use as_loaded")
        if base.in_features % _MULTIPLE or base.out_features % _MULTIPLE:
            raise ConfigError(
                f"{setting}: {name} has {base.in_features} inputs and "
                f"{base.out_features} outputs, expected multiples of {_MULTIPLE}; use as_loaded"
            )


def check_gradient(found: Probe, expected: Probe, precision: str) -> float:
    """Check that rounding moved the gradient as little as rounding does; return by how much.

    Args:
        found: with the layers in FP8.
        expected: with the layers as they were loaded.

    Raises:
        ConfigError: this device, or its compiler, computes another gradient.
    """
    gap, limit = gradient_gap(found, expected), _LARGEST_GAP[precision]
    if not gap <= limit:  # or it is NaN
        raise ConfigError(
            f"training.base_precision={precision}: on this device it moves the gradient of a "
            f"matrix by {gap:.2f} of its norm, expected at most {limit}: more than rounding does; "
            + (remedy("use as_loaded") if math.isnan(gap) else "use as_loaded")
        )
    return gap


def _check_device(device: torch.device, setting: str) -> None:
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _FIRST_CAPABILITY:
            raise ConfigError(
                f"{setting}: {torch.cuda.get_device_name(device)} has compute "
                f"capability {capability[0]}.{capability[1]} and no FP8 products, which begin with "
                f"{_FIRST_CAPABILITY[0]}.{_FIRST_CAPABILITY[1]}; use as_loaded"
            )
    if not has_rowwise_products(device):
        raise ConfigError(
            f"{setting}: PyTorch {torch.__version__} has no FP8 products with a scale per row on "
            f"{device.type}; use as_loaded, or a newer PyTorch"
        )


def has_rowwise_products(device: torch.device) -> bool:
    """Whether PyTorch multiplies float8 matrices with a scale per row there."""
    matrix = quantize_rows(torch.ones(_MULTIPLE, _MULTIPLE, device=device))
    try:
        rowwise_product(matrix, matrix, torch.bfloat16)
    except torch.OutOfMemoryError:  # says nothing of the products
        raise
    except RuntimeError:
        return False
    return True
