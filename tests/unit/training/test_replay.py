"""Replayed steps: their layout, their denominator, and the priorities that they leave behind."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_distill.config import (
    EmbeddedTraining,
    ObjectiveConfig,
    OptimizerConfig,
    ProportionalLaw,
    ReplayConfig,
    SampledReverseKL,
    TopKDivergence,
)
from qwen3_distill.replay.buffer import ReplayBuffer, build_replay
from qwen3_distill.replay.flat import flatten
from qwen3_distill.training.batching import MicroBatch, flat_micro_batches, micro_batches
from qwen3_distill.training.embedded.student import EmbeddedLearner
from qwen3_distill.training.objectives.build import build_objective
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.types import Batch, ScoredRollout
from tests.contract.builders import synthetic_rollout
from tests.contract.reference import reference_model, reference_score, token_logprobs
from tests.tiny_models import TinyModels

CLIP = 0.3
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "sampled": SampledReverseKL(kind="sampled_reverse_kl", advantage_clip=CLIP),
    "top_k": TopKDivergence(kind="top_k", k=4),
}
LENGTHS = [(3, 9), (12, 2), (1, 17), (5, 5), (2, 30)]


def replaying(
    models: TinyModels, objective: ObjectiveConfig, scored: list[ScoredRollout], tokens: int
) -> tuple[EmbeddedLearner, ReplayBuffer]:
    config = ReplayConfig(
        capacity_tokens=1000,
        priority_clip_nats=100.0,
        law=ProportionalLaw(kind="proportional", alpha=1.0),  # the mass is the priority
    )
    buffer = build_replay(config, objective, device=torch.device("cpu"), seed=1)
    settings = LearnerSettings(
        model_dir=models.student,
        training=EmbeddedTraining(
            kind="embedded",
            device="cpu",
            micro_batch_tokens=tokens,
            optimizer=OptimizerConfig(learning_rate=1e-3),
        ),
        objective=objective,
        total_steps=9,
        seed=0,
    )
    built = build_objective(objective, teacher_head_VD=None, chunk_tokens=64)
    learner = EmbeddedLearner(settings, built, buffer)
    asyncio.run(learner.admit(scored))
    return learner, buffer


SAMPLED = [[(0, 4), (7, 8)], [], [(3, 17)], [(1, 2)], [(0, 1), (5, 20), (22, 30)]]


def scored_by(
    models: TinyModels, request: Any, sampled: Sequence[Sequence[tuple[int, int]]] = [[]] * 5
) -> list[ScoredRollout]:
    teacher = reference_model(models.teacher)
    rollouts = [
        synthetic_rollout(p, r, seed, sampled=sampled[seed]) for seed, (p, r) in enumerate(LENGTHS)
    ]
    return [ScoredRollout(rollout=r, score=reference_score(teacher, r, request)) for r in rollouts]


@pytest.mark.parametrize("sampled", [[[]] * 5, SAMPLED], ids=["whole", "in_parts"])
@pytest.mark.parametrize("tokens", [1, 35, 10**6])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_used_rollout_gets_its_own_mean_magnitude(
    tiny_models: TinyModels, name: str, tokens: int, sampled: list[list[tuple[int, int]]]
) -> None:
    objective = OBJECTIVES[name]
    scored = scored_by(tiny_models, objective.score_request, sampled)
    learner, buffer = replaying(tiny_models, objective, scored, tokens)
    first = buffer._mass[:5].tolist()
    student = reference_model(tiny_models.student)
    sample = buffer.sample(3, 0)
    asyncio.run(learner.update_replayed(3))
    for slot, entry in enumerate(scored):
        priority = float(buffer._mass[slot])
        if slot not in sample.places_S:
            assert priority == first[slot]
        elif name == "sampled":
            gap = entry.score.logprobs - token_logprobs(student, entry.rollout)
            expected = np.abs(gap.clip(-CLIP, CLIP)).mean()
            assert expected < 0.9 * np.abs(gap).mean()
            assert priority == pytest.approx(float(expected), rel=1e-4)
        else:
            assert priority == pytest.approx(loss_alone(tiny_models, objective, entry), rel=1e-4)
    assert buffer._uses[:5].sum() == 3


@pytest.mark.parametrize("tokens", [1, 35, 10**6])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_replayed_step_divides_by_the_sampled_tokens(
    tiny_models: TinyModels, name: str, tokens: int
) -> None:
    objective = OBJECTIVES[name]
    scored = scored_by(tiny_models, objective.score_request, SAMPLED)
    learner, _ = replaying(tiny_models, objective, scored, tokens)
    direct, _ = replaying(tiny_models, objective, scored, tokens)
    # Every rollout is drawn, with weights of 1: the batch of them all.
    replayed = asyncio.run(learner.update_replayed(5))
    expected = asyncio.run(direct.update(Batch.uniform(scored)))
    assert replayed.num_loss_tokens == expected.num_loss_tokens == 5 + 2 + 14 + 1 + 24
    assert replayed.loss == pytest.approx(expected.loss, rel=1e-5)
    assert replayed.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


def loss_alone(models: TinyModels, objective: ObjectiveConfig, entry: ScoredRollout) -> float:
    """A rollout's mean divergence is the loss of a batch of it alone."""
    learner, _ = replaying(models, objective, [entry], 10**6)
    return asyncio.run(learner.update(Batch.uniform([entry]))).loss


@pytest.mark.parametrize("sampled", [[[]] * 5, SAMPLED], ids=["whole", "in_parts"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 35, 10**6])
def test_flat_rollouts_are_laid_out_as_their_records(
    tiny_models: TinyModels, packed: bool, max_tokens: int, sampled: list[list[tuple[int, int]]]
) -> None:
    scored = scored_by(tiny_models, OBJECTIVES["top_k"].score_request, sampled)
    weights = np.arange(1, 6, dtype=np.float32)
    batch = Batch(
        scored=tuple(scored), importance_weights=weights, task_advantages=np.zeros(5, np.float32)
    )
    flat = flatten(scored)
    ours = list(flat_micro_batches(flat, torch.from_numpy(weights), max_tokens, packed=packed))
    theirs = list(micro_batches(batch, max_tokens, packed=packed))
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert_equal(mine, other)


def assert_equal(left: MicroBatch, right: MicroBatch) -> None:
    assert type(left) is type(right)
    for name, value in vars(left).items():
        other = getattr(right, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other), name
        else:
            assert value == other, name
