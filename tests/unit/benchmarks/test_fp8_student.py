"""The benchmark of a student in FP8 rounds as vLLM does, and with its scales the gap is gone."""

import asyncio
from typing import Any

import pytest
import torch

from benchmarks.learning.fp8_student import (
    STUDENT,
    answers,
    dequantized,
    figures_of,
    fused_layers,
    gaps,
    learner_with,
    serve_in_fp8,
    with_one_scale,
)
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.training.fp8_base import quantize_rows
from qwen3_distill.types import Rollout

LARGEST = 448.0
"""float8 e4m3's."""


def test_a_row_has_the_scale_that_vllm_gives_a_token() -> None:
    """The rule of vLLM's ``QuantFP8`` with a scale per token: the largest magnitude over 448."""
    torch.manual_seed(0)
    x_MK = torch.randn(64, 256) * torch.logspace(-2, 2, 64).unsqueeze(1)
    scales_M1 = x_MK.abs().amax(dim=-1, keepdim=True) / LARGEST
    rounded = quantize_rows(x_MK)
    assert torch.equal(rounded.scales, scales_M1)
    expected_MK = (x_MK / scales_M1).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    assert torch.equal(rounded.values.float(), expected_MK.float())


def test_a_fused_weight_has_one_scale() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(32, 16), 8 * torch.randn(16, 16)]
    scale = torch.cat(weights).abs().max() / LARGEST
    for weight, rounded in zip(weights, with_one_scale(weights), strict=True):
        assert rounded.values.shape == weight.shape
        assert torch.equal(rounded.scales, scale.expand(weight.shape[0], 1))
        expected = (weight / scale).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(dequantized(rounded), expected)


def test_every_linear_layer_but_the_head_is_served_in_fp8() -> None:
    model: Any = load_model(STUDENT, device=torch.device("cpu"), dtype=torch.float32)
    kept = [name for name, _ in model.named_parameters() if "_proj" not in name]
    expected = {
        f"{id(owner)}.{name}"
        for layer in model.model.layers
        for owner in (layer.self_attn, layer.mlp)
        for name, module in owner.named_children()
        if isinstance(module, torch.nn.Linear)
    }
    found = [f"{id(owner)}.{name}" for places in fused_layers(model) for owner, name in places]
    assert sorted(found) == sorted(expected)
    serve_in_fp8(model)
    assert [name for name, _ in model.named_parameters()] == kept


@pytest.fixture(scope="module")
def served() -> list[Rollout]:
    return asyncio.run(answers("fp8", "float32", count=32))


def test_with_the_engines_layers_the_gap_is_gone(served: list[Rollout]) -> None:
    """The control: nothing but rounding is between the engine and the learner."""
    found = {
        layers: figures_of("x", gaps(learner_with(layers, "float32", adapters=False), served))
        for layers in ("as_loaded", "engine_scales", "engine_layers")
    }
    assert found["engine_layers"]["x_mean"] < 1e-3
    assert found["engine_scales"]["x_mean"] < found["as_loaded"]["x_mean"]


def test_figures_are_of_sizes_and_the_cap_of_the_ratio() -> None:
    gap_N = torch.tensor([0.0] * 98 + [-1.0, 1.0])
    figures = figures_of("x", gap_N)
    assert figures["x_mean"] == pytest.approx(0.02)
    assert figures["x_p99"] == pytest.approx(1.0)
    assert figures["x_above_cap"] == pytest.approx(0.01)
