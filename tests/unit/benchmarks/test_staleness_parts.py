"""The staleness benchmark's own parts: gradients by hand, an exact lag, the product's bits."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.lib.staleness_parts import (
    Advantage,
    Case,
    LaggedEngine,
    Ratio,
    StaleObjective,
    StaleTerms,
    adapted,
    stale_surrogate,
)
from qwen3_distill.config import SampledReverseKL
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.ports import FullWeights
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.training.batching import MicroBatch
from qwen3_distill.training.objectives.base import Objective
from qwen3_distill.training.objectives.build import build_objective
from qwen3_distill.types import WeightVersion
from qwen3_distill.weights.memory import MemoryChannel
from tests.pipeline.builders import raise_warning, student_bytes, tiny_config
from tests.tiny_models import TinyModels

PI = [0.5, 0.5, 0.15, 0.1, 0.6, 0.3]
MU = [0.2, 0.4, 0.20, 0.2, 0.2, 0.3]
Q = [0.8, 0.1, 0.40, 0.05, 0.05, 0.3]
"""Ratios 2.5, 1.25, 0.75, 0.5, 3, 1; old and current advantage differ and some are clipped."""
WEIGHT = 0.5
DENOMINATOR = 4.0

# By hand, d loss / d log pi_theta(a_t) = - WEIGHT / DENOMINATOR * rho_t * A_t.
A_OLD = [np.log(4), np.log(0.25), np.log(2), np.log(0.25), np.log(0.25), 0.0]
A_CURRENT = [np.log(1.6), np.log(0.2), np.log(0.4 / 0.15), np.log(0.5), -2.0, 0.0]  # log(1/12)
RHO: dict[Ratio, list[float]] = {
    "none": [1, 1, 1, 1, 1, 1],
    "truncated": [2, 1.25, 0.75, 0.5, 2, 1],
}
RHO_PPO_CLIP = [0, 1.25, 0.75, 0, 3, 1]
"""A > 0 above 1.2 and A < 0 below 0.8 have no gradient; both advantages have these signs."""


def surrogate(advantage: Advantage, ratio: Ratio) -> tuple[StaleTerms, Tensor]:
    """The loss of the six tokens and its gradient to their logprobs."""
    learner_N = torch.tensor(PI).log().requires_grad_()
    terms = stale_surrogate(
        learner_N,
        torch.tensor(MU).log(),
        torch.tensor(Q).log(),
        torch.full((6,), WEIGHT),
        advantage=advantage,
        ratio=ratio,
        denominator=DENOMINATOR,
        ratio_cap=2.0,
        ppo_clip=0.2,
        advantage_clip=2.0,
    )
    terms.loss.backward()
    assert learner_N.grad is not None
    return terms, learner_N.grad


@pytest.mark.parametrize("ratio", get_args(Ratio))
@pytest.mark.parametrize(("advantage", "values"), [("old", A_OLD), ("current", A_CURRENT)])
def test_per_token_gradient_by_hand(
    advantage: Advantage, values: list[float], ratio: Ratio
) -> None:
    terms, gradient_N = surrogate(advantage, ratio)
    rho = np.array(RHO_PPO_CLIP if ratio == "ppo_clip" else RHO[ratio])
    expected = -WEIGHT / DENOMINATOR * rho * np.array(values)
    np.testing.assert_allclose(gradient_N.numpy(), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(terms.advantage_N.numpy(), values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("ratio", "capped"),
    [
        ("none", [False] * 6),
        ("truncated", [True, False, False, False, True, False]),
        ("ppo_clip", [True, False, False, True, False, False]),
    ],
)
def test_capped_tokens_are_those_whose_ratio_was_changed(ratio: Ratio, capped: list[bool]) -> None:
    assert surrogate("current", ratio)[0].capped_N.tolist() == capped


def test_the_clipped_surrogate_has_ppos_value() -> None:
    terms, _ = surrogate("current", "ppo_clip")
    used = np.array([1.2, 1.25, 0.75, 0.8, 3, 1])
    expected = -WEIGHT / DENOMINATOR * (used * np.array(A_CURRENT)).sum()
    assert terms.loss.item() == pytest.approx(expected, rel=1e-5)


def micro_batch(behavior_logprob_N: Tensor) -> MicroBatch:
    """One rollout of 40 tokens of a vocabulary of 11."""
    generator = torch.Generator().manual_seed(1)
    size = behavior_logprob_N.numel()
    return MicroBatch(
        rollouts=(0,),
        input_BT=torch.zeros(1, size, dtype=torch.long),
        position_BT=torch.arange(size).unsqueeze(0),
        sequence_tokens=(size,),
        loss_tokens=(size,),
        loss_index_N=torch.arange(size),
        by_teacher=(False,),
        is_scored=True,
        target_N=torch.randint(0, 11, (size,), generator=generator),
        behavior_logprob_N=behavior_logprob_N,
        teacher_logprob_N=-3 * torch.rand(size, generator=generator),
        importance_weight_N=torch.rand(size, generator=generator) + 0.5,
        task_advantage_N=torch.zeros(size),
    )


def gradient_of(objective: Objective, micro: MicroBatch) -> tuple[float, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden_BTD = torch.randn(1, micro.target_N.numel(), 6, generator=generator)
    head_VD = torch.randn(11, 6, generator=generator, requires_grad=True)
    terms = objective.terms(micro, hidden_BTD, head_VD, 17.0)
    terms.loss.backward()
    assert head_VD.grad is not None
    return terms.loss.item(), head_VD.grad


@pytest.mark.parametrize(("ratio", "ratio_cap"), [("truncated", 2.0), ("none", None)])
def test_current_advantage_is_the_products_objective_to_the_bit(
    ratio: Ratio, ratio_cap: float | None
) -> None:
    micro = micro_batch(-4 * torch.rand(40, generator=torch.Generator().manual_seed(3)))
    config = SampledReverseKL(kind="sampled_reverse_kl", ratio_cap=ratio_cap, advantage_clip=2.0)
    product = build_objective(config, teacher_head_VD=None, chunk_tokens=16)
    ours = StaleObjective(
        advantage="current", ratio=ratio, ratio_cap=2.0, advantage_clip=2.0, chunk_tokens=16
    )
    loss, gradient = gradient_of(product, micro)
    our_loss, our_gradient = gradient_of(ours, micro)
    assert our_loss == loss
    assert torch.equal(our_gradient, gradient)


EVERY_CASE = [(advantage, ratio) for advantage in get_args(Advantage) for ratio in get_args(Ratio)]


def test_the_cases_differ_on_stale_tokens_and_agree_on_fresh_ones() -> None:
    stale = micro_batch(-4 * torch.rand(40, generator=torch.Generator().manual_seed(3)))
    generator = torch.Generator().manual_seed(2)
    hidden_ND = torch.randn(40, 6, generator=generator)
    head_VD = torch.randn(11, 6, generator=generator)
    logprob_NV = (hidden_ND @ head_VD.T).log_softmax(-1)
    own_N = logprob_NV.gather(-1, stale.target_N.unsqueeze(-1)).squeeze(-1)
    fresh = replace(stale, behavior_logprob_N=own_N)
    for micro, distinct in ((stale, len(EVERY_CASE)), (fresh, 1)):
        gradients = [
            gradient_of(
                StaleObjective(
                    advantage=advantage, ratio=ratio, advantage_clip=2.0, chunk_tokens=99
                ),
                micro,
            )[1]
            for advantage, ratio in EVERY_CASE
        ]
        found: list[Tensor] = []
        for gradient in gradients:
            if not any(torch.allclose(gradient, other, atol=1e-5) for other in found):
                found.append(gradient)
        assert len(found) == distinct


def trained(models: TinyModels, folder: Path, case: Case | None) -> list[dict[str, Any]]:
    """A tiny run's steps; with a case, by the benchmark's parts."""
    objective = {"kind": "sampled_reverse_kl", "ratio_cap": 2.0, "advantage_clip": 2.0}
    config = tiny_config(models, folder, {"steps": 6, "objective": objective})

    def adapt(parts: Parts) -> Parts:
        return parts if case is None else adapted(parts, case)

    assert run(config, SilentReporter(), raise_warning, adapt)
    return read_jsonl(folder / "metrics.jsonl")


def test_the_reference_case_trains_the_products_student_to_the_bit(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    trained(tiny_models, tmp_path / "product", None)
    for name, case in {
        "reference": Case(staleness=0, advantage="current", ratio="truncated"),
        "stale": Case(staleness=1, advantage="current", ratio="truncated"),
    }.items():
        trained(tiny_models, tmp_path / name, case)
    product = student_bytes(tmp_path / "product")
    assert student_bytes(tmp_path / "reference") == product
    assert student_bytes(tmp_path / "stale") != product


@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_rollouts_lag_by_exactly_so_many_steps(
    staleness: int, tiny_models: TinyModels, tmp_path: Path
) -> None:
    case = Case(staleness=staleness, advantage="old", ratio="none")
    steps = trained(tiny_models, tmp_path, case)
    assert [step["weights/lag_steps"] for step in steps] == [min(s, staleness) for s in range(6)]


def test_a_lagged_engine_serves_the_oldest_of_its_versions(tiny_models: TinyModels) -> None:
    folder = str(tiny_models.student)
    inner = EmbeddedRolloutEngine(folder, device="cpu", dtype="float32", max_sequences=8)
    engine, channel = LaggedEngine(inner, lag_steps=2), MemoryChannel()
    weights = dict(
        load_model(folder, device=torch.device("cpu"), dtype=torch.float32).named_parameters()
    )
    served: list[int] = []
    for step in range(5):
        with torch.no_grad():
            for parameter in weights.values():
                parameter.add_(0.01)
        version = WeightVersion(step=step, digest=weights_digest(weights))
        channel.publish(version, FullWeights(tensors=weights))
        asyncio.run(engine.load(version, channel))
        served.append(engine.version.step)
    assert served == [0, 0, 0, 1, 2]
