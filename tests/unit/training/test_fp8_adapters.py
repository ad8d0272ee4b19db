"""Adapted layers in one function: the forward pass of peft, input gradients of rounded factors.

Shape letters: M tokens, N outputs of a layer, K inputs.
"""

import functools
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_distill.config import LoraTuning
from qwen3_distill.errors import EngineStartError
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.training.fp8_adapters import (
    Adapted,
    Kernels,
    Turned,
    adapted_mlp,
    adapted_outputs,
)
from qwen3_distill.training.fp8_base import freeze_in_fp8, has_rowwise_products, quantize_rows
from qwen3_distill.training.lora import add_adapters
from qwen3_distill.training.unsloth.fp8_layers import replace_fused, round_fused_gradients
from tests.tiny_models import TinyModels

pytestmark = pytest.mark.skipif(
    not has_rowwise_products(torch.device("cpu")), reason="this PyTorch has no FP8 on a CPU"
)

K, N = 32, 48


def add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    out.addmm_(left, right, alpha=alpha)


def activate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def activate_backward(d: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite what is given, as unsloth's kernel does."""
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dup, dgate = d * silu, d * up * sigmoid * (1 + gate * (1 - sigmoid))
    return d.copy_(silu * up), gate.copy_(dup), up.copy_(dgate)


KERNELS = Kernels(add_product, activate, activate_backward)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def adapted(
    outputs: int, inputs: int, scaling: float = 2.0, dtype: torch.dtype = torch.float32
) -> Adapted:
    """A layer in this dtype; adapters are float32 always."""
    return Adapted(
        (torch.randn(outputs, inputs) / inputs**0.5).to(dtype),
        (torch.randn(4, inputs) / inputs**0.5).requires_grad_(),
        torch.randn(outputs, 4).requires_grad_(),
        scaling,
    )


def plain(x: Tensor, layer: Adapted) -> Tensor:
    weight_NK, down_RK, up_NR, scaling = layer
    return x @ weight_NK.float().T + scaling * (x @ down_RK.T) @ up_NR.T


def gradients(outputs: tuple[Tensor, ...], x: Tensor, layers: list[Adapted]) -> list[Tensor]:
    """Return the gradients of the input, then those of the adapters."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    wanted = [x, *(matrix for layer in layers for matrix in layer[1:3])]
    return list(torch.autograd.grad(outputs, wanted, weights))


def cosine(left: Tensor, right: Tensor) -> float:
    return torch.cosine_similarity(left.flatten(), right.flatten(), dim=0).item()


def attention_layers(dtype: torch.dtype = torch.float32) -> tuple[list[Adapted], Turned]:
    layers = [adapted(N, K, 2, dtype), adapted(16, K, 0.5, dtype), adapted(16, K, 2, dtype)]
    return layers, Turned([layer.weight_NK for layer in layers])


def mlp_layers(dtype: torch.dtype = torch.float32) -> tuple[list[Adapted], Turned, Turned]:
    gate, up, down = adapted(N, K, 2, dtype), adapted(N, K, 0.5, dtype), adapted(K, N, 2, dtype)
    return (
        [gate, up, down],
        Turned([gate.weight_NK, up.weight_NK]),
        Turned([down.weight_NK]),
    )


# --- The functions --------------------------------------------------------------------------------


def test_parts_of_a_matrix_are_rounded_as_the_whole() -> None:
    left, right = torch.randn(6, 16), 100 * torch.randn(6, 32)
    parts, whole = quantize_rows(left, right), quantize_rows(torch.cat([left, right], dim=-1))
    assert torch.equal(parts.scales, whole.scales)
    assert torch.equal(parts.values.view(torch.uint8), whole.values.view(torch.uint8))


def test_outputs_and_the_adapters_gradients_are_those_of_peft() -> None:
    layers, turned = attention_layers()
    x = torch.randn(2, 5, K, requires_grad=True)
    ours = adapted_outputs(x, layers, turned, KERNELS)
    exact = tuple(plain(x, layer) for layer in layers)
    torch.testing.assert_close(ours, exact)
    found, expected = gradients(ours, x, layers), gradients(exact, x, layers)
    torch.testing.assert_close(found[1:], expected[1:])
    assert 0.999 < cosine(found[0], expected[0]) < 1


def test_the_input_gradient_is_the_product_of_the_rounded_factors() -> None:
    layers, turned = attention_layers()
    layers = [layer._replace(up_NR=torch.zeros_like(layer.up_NR)) for layer in layers]
    x_MK = torch.randn(7, K, requires_grad=True)
    dys_MN = [torch.randn(7, layer.weight_NK.shape[0]) for layer in layers]
    outputs = adapted_outputs(x_MK, layers, turned, KERNELS)
    (dx_MK,) = torch.autograd.grad(outputs, [x_MK], dys_MN)

    def rounded(matrix: Tensor) -> Tensor:
        values, scales = quantize_rows(matrix)
        return values.float() * scales

    weights_SK = torch.cat([layer.weight_NK for layer in layers])
    expected_MK = rounded(torch.cat(dys_MN, dim=-1)) @ rounded(weights_SK.T.contiguous()).T
    torch.testing.assert_close(dx_MK, expected_MK, rtol=1e-2, atol=5e-2)  # rounded to bfloat16


def test_an_mlp_is_that_of_peft() -> None:
    layers, gate_up, down = mlp_layers()
    x = torch.randn(2, 5, K, requires_grad=True)
    ours = adapted_mlp(x, layers, gate_up, down, KERNELS)
    gate, up, last = layers
    exact = plain(activate(plain(x, gate), plain(x, up)), last)
    torch.testing.assert_close(ours, exact)
    found, expected = gradients((ours,), x, layers), gradients((exact,), x, layers)
    torch.testing.assert_close(found[-2:], expected[-2:])  # of down: nothing is rounded before it
    for one, other in zip(found, expected, strict=True):
        assert cosine(one, other) > 0.999


@pytest.mark.parametrize("shape", ["queries", "MLP"])
def test_in_bfloat16_with_adapters_in_float32_it_is_nearly_the_same(shape: str) -> None:
    """The dtypes are those of unsloth on a GPU."""
    x = torch.randn(2, 5, K).bfloat16().float().requires_grad_()
    x_16 = x.detach().bfloat16().requires_grad_()
    if shape == "MLP":
        layers, gate_up, down = mlp_layers(torch.bfloat16)
        ours: tuple[Tensor, ...] = (adapted_mlp(x_16, layers, gate_up, down, KERNELS),)
        gate, up, last = layers
        exact: tuple[Tensor, ...] = (plain(activate(plain(x, gate), plain(x, up)), last),)
    else:
        layers, turned = attention_layers(torch.bfloat16)
        ours = adapted_outputs(x_16, layers, turned, KERNELS)
        exact = tuple(plain(x, layer) for layer in layers)
    assert {y.dtype for y in ours} == {torch.bfloat16}
    for one, other in zip(ours, exact, strict=True):
        assert cosine(one.float(), other) > 0.9999
    found, expected = gradients(ours, x_16, layers), gradients(exact, x, layers)
    assert [each.dtype for each in found] == [torch.bfloat16] + [torch.float32] * 6
    for one, other in zip(found, expected, strict=True):
        assert cosine(one.float(), other) > 0.999


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # its own
@pytest.mark.parametrize("shape", ["queries", "MLP"])
def test_a_compiler_follows_the_functions(shape: str) -> None:
    """unsloth compiles a layer as one region, which nothing in the functions may end."""
    x = torch.randn(2, 5, K, requires_grad=True)
    if shape == "MLP":
        layers, gate_up, down = mlp_layers()
    else:
        layers, gate_up = attention_layers()
        down = None

    def compute(x: Tensor) -> tuple[Tensor, ...]:
        if down is None:
            return adapted_outputs(x, layers, gate_up, KERNELS)
        return (adapted_mlp(x, layers, gate_up, down, KERNELS),)

    compiled: Any = torch.compile(compute, backend="aot_eager", fullgraph=True)
    found, expected = gradients(compiled(x), x, layers), gradients(compute(x), x, layers)
    torch.testing.assert_close(found, expected)


# --- In the layers of a model ---------------------------------------------------------------------


FUSED = SimpleNamespace(
    apply_lora_qkv=lambda *_: None,
    apply_lora_o=lambda *_: None,
    apply_lora_mlp_swiglu=lambda *_: None,
)
"""Stands for the module of unsloth that has its fused functions."""


def model_with_adapters(model_dir: Path, *targets: str) -> Any:
    """A model with adapters that change its outputs, its layers as unsloth fuses them."""
    tuning = LoraTuning(kind="lora", rank=4, alpha=8.0)
    if targets:
        tuning = tuning.model_copy(update={"target_modules": targets})
    base = load_model(model_dir, device=torch.device("cpu"), dtype=torch.float32)
    core: Any = add_adapters(base, tuning, 0)
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    for layer in core.model.layers:
        if "q_proj" in tuning.target_modules:
            layer.self_attn.apply_qkv = FUSED.apply_lora_qkv
        if "o_proj" in tuning.target_modules:
            layer.self_attn.apply_o = FUSED.apply_lora_o
        if "down_proj" in tuning.target_modules:
            layer.mlp.forward = types.MethodType(FUSED.apply_lora_mlp_swiglu, layer.mlp)
    return core


def test_the_fused_functions_of_all_layers_are_replaced(tiny_models: TinyModels) -> None:
    core = model_with_adapters(tiny_models.student)
    names = replace_fused(core, FUSED, KERNELS)
    adapted_names = {name for name, module in core.named_modules() if hasattr(module, "lora_A")}
    assert names == adapted_names
    x = torch.randn(2, 5, core.config.hidden_size)
    for layer in core.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        exact = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
        torch.testing.assert_close(attention.apply_qkv(attention, x), exact)
        torch.testing.assert_close(
            attention.apply_o(attention, exact[0]), attention.o_proj(exact[0])
        )
        torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x))


@pytest.mark.parametrize("left", [0, 1])
def test_layers_that_are_fused_in_another_way_are_refused(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """Their gradients would not be rounded, whatever the learner says of itself."""
    core = model_with_adapters(tiny_models.student)
    kernels = SimpleNamespace(swiglu_fg_kernel=activate, swiglu_DWf_DW_dfg_kernel=activate_backward)
    modules = {
        "kernels.fast_lora": SimpleNamespace(**vars(FUSED), **vars(kernels)),
        "kernels.utils": SimpleNamespace(addmm_=add_product),
        "models.llama": SimpleNamespace(_fused_lora_modules=lambda core: [core.model][:left]),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"unsloth.{name}", module)
    if left:
        with pytest.raises(EngineStartError, match="unsloth fused 1 modules in another way"):
            round_fused_gradients(core)
    else:
        assert len(round_fused_gradients(core)) == 14


def test_layers_that_are_not_fused_get_rounded_gradients_of_their_own(
    tiny_models: TinyModels,
) -> None:
    core = model_with_adapters(tiny_models.student, "o_proj", "gate_proj")
    names = replace_fused(core, FUSED, KERNELS)
    assert names == {f"model.layers.{index}.self_attn.o_proj" for index in range(2)}
    freeze_in_fp8(core, tiny_models.student, "fp8_backward", done=names)
    kinds = {
        name.rsplit(".", 1)[-1]: type(module.base_layer).__name__
        for name, module in core.named_modules()
        if hasattr(module, "lora_A")
    }
    assert kinds == {"o_proj": "Linear", "gate_proj": "Fp8BackwardLinear"}


def test_a_step_of_the_whole_model_has_nearly_the_exact_gradient(tiny_models: TinyModels) -> None:
    """Hugging Face's attention calls each projection by itself, so each asks for its output."""
    core = model_with_adapters(tiny_models.student)
    ids = torch.randint(core.config.vocab_size, (2, 9))
    weights = torch.randn(2, 9, core.config.hidden_size)

    def gradient() -> Tensor:
        core.zero_grad()
        # A sum of squares would be nearly constant behind the last norm, and its gradient noise.
        (core.model(input_ids=ids)[0].float() * weights).sum().backward()
        parts = [p.grad.flatten() for p in core.parameters() if p.grad is not None]
        return torch.cat(parts)

    def asks(attention: Any, index: int) -> Any:
        return lambda x: attention.apply_qkv(attention, x)[index]

    for layer in core.model.layers:
        layer.mlp.forward = types.MethodType(type(layer.mlp).forward, layer.mlp)
    exact = gradient()
    for layer in core.model.layers:
        layer.mlp.forward = types.MethodType(FUSED.apply_lora_mlp_swiglu, layer.mlp)
    assert len(replace_fused(core, FUSED, KERNELS)) == 14
    for layer in core.model.layers:
        attention = layer.self_attn
        attention.q_proj.forward = asks(attention, 0)
        attention.k_proj.forward = asks(attention, 1)
        attention.v_proj.forward = asks(attention, 2)
        attention.o_proj.forward = functools.partial(attention.apply_o, attention)
    rounded = gradient()
    assert 0.99 < cosine(rounded, exact) < 1
