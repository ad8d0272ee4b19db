"""The probe compares a device's gradients with the plain way, before anything is trained."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qwen3_distill.config import EmbeddedTraining, LoraTuning, SampledReverseKL
from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.training import fp8_base
from qwen3_distill.training.embedded.student import build_embedded_learner
from qwen3_distill.training.gradient_probe import (
    Probe,
    gradient_gap,
    probe,
    probe_rows,
)
from qwen3_distill.training.learner import TorchLearner
from qwen3_distill.training.lora import add_adapters
from qwen3_distill.training.settings import LearnerSettings
from tests.tiny_models import TinyModels

CPU = torch.device("cpu")

needs_fp8 = pytest.mark.skipif(
    not fp8_base.has_rowwise_products(CPU), reason="this PyTorch has no FP8 on a CPU"
)


def learner(model: Path) -> TorchLearner:
    training = EmbeddedTraining(
        kind="embedded",
        device="cpu",
        tuning=LoraTuning(kind="lora", rank=4, alpha=8.0),
        base_precision="fp8_backward",
    )
    objective = SampledReverseKL(kind="sampled_reverse_kl")
    return build_embedded_learner(
        LearnerSettings(
            model_dir=model, training=training, objective=objective, total_steps=1, seed=0
        )
    )


def test_dropout_is_off_and_the_model_as_before_afterwards(tiny_models: TinyModels) -> None:
    base = load_model(tiny_models.student, device=CPU, dtype=torch.float32)
    tuning = LoraTuning(kind="lora", rank=4, alpha=8.0, dropout=0.5)
    core = add_adapters(base, tuning, 0).train()
    first, second = probe_rows(core), probe_rows(core)
    assert torch.equal(first.hidden, second.hidden)
    assert gradient_gap(second, first) == 0
    assert first.gradients.keys() == second.gradients.keys()
    adapters = [name for name, _ in core.named_parameters() if ".lora_" in name]
    assert len(first.gradients) == len(adapters)  # this model's two layers are the outer ones
    assert all(gradient.norm() > 0 for gradient in first.gradients.values())
    # What was filled for it is as it was: zeros, with which training begins.
    assert not any(p.any() for name, p in core.named_parameters() if ".lora_B." in name)
    assert core.training
    assert all(each.training for each in core.modules() if isinstance(each, nn.Dropout))
    assert all(parameter.grad is None for parameter in core.parameters())


def test_a_part_without_a_gradient_counts_as_zero(tiny_models: TinyModels) -> None:
    core = load_model(tiny_models.student, device=CPU, dtype=torch.float32).train()
    ids = torch.tensor([[5, 6, 7, 8]])

    def whole() -> Tensor:
        return core.model(input_ids=ids, use_cache=False)[0]

    def without_layers() -> Tensor:
        return core.model.embed_tokens(ids)

    expected, found = probe(core, whole), probe(core, without_layers)
    assert found.gradients.keys() == expected.gradients.keys()
    assert gradient_gap(found, expected) == 1


def test_the_gap_is_that_of_the_worst_matrix() -> None:
    large = torch.tensor([300.0, 400.0])

    def given(*values: float) -> Probe:
        return Probe(torch.zeros(1), {"0.large": large, "1.small": torch.tensor(values)})

    cosine = 24 / 25
    gap = gradient_gap(given(4.0, 3.0), given(3.0, 4.0))
    assert gap == pytest.approx((2 - 2 * cosine) ** 0.5)
    assert gradient_gap(given(0.0, 0.0), given(3.0, 4.0)) == 1
    assert math.isnan(gradient_gap(given(float("nan"), 4.0), given(3.0, 4.0)))


@needs_fp8
def test_a_learner_says_by_how_much_rounding_moved_its_gradient(tiny_models: TinyModels) -> None:
    said = learner(tiny_models.student).student.describe()["frozen layers"]
    how, moved = said.split("; gradients moved by ")
    assert how == "fp8_backward"
    assert 1e-3 < float(moved.split()[0]) < 0.2


@needs_fp8
@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan])
def test_a_device_that_computes_another_gradient_is_refused(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    of_device = fp8_base._input_gradient
    monkeypatch.setattr(
        fp8_base, "_input_gradient", lambda ctx, dy_MN: wrong * of_device(ctx, dy_MN)
    )
    with pytest.raises(
        ConfigError, match=r"gradient of a matrix by .* at most 0\.5.* use as_loaded"
    ):
        learner(tiny_models.student)
