"""Responses that were sampled in parts: only sampled tokens have a value, a loss and a gradient.

Rollouts here are hidden states, not a model's: a leaf per rollout with a row per input token. So a
gradient at a position is the loss's alone, and attention cannot carry one to other positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen3_distill.config import (
    FullBaseline,
    FullDivergence,
    ObjectiveConfig,
    ReplayConfig,
    SampledReverseKL,
    TopKBaseline,
    TopKDivergence,
    candidates_per_token,
)
from qwen3_distill.replay.buffer import ReplayBuffer
from qwen3_distill.training.batching import MicroBatch, flat_micro_batches, micro_batches
from qwen3_distill.training.objectives.build import build_objective
from qwen3_distill.types import (
    Batch,
    HiddenScore,
    Rollout,
    ScoredRollout,
    TeacherScore,
    TopKScore,
)
from tests.contract.builders import synthetic_rollout
from tests.contract.reference import (
    naive_token_losses,
    sampled_ids,
    sampled_positions,
    scored_of,
)

VOCAB, HIDDEN, K = 256, 6, 3
CPU = torch.device("cpu")
HEADS = torch.randn(2, VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
HEAD_VD, TEACHER_HEAD_VD = HEADS[0], HEADS[1]

OBJECTIVES: dict[str, ObjectiveConfig] = {
    "sampled": SampledReverseKL(kind="sampled_reverse_kl", advantage_clip=2.0),
    "sampled_discount": SampledReverseKL(
        kind="sampled_reverse_kl", advantage_clip=2.0, discount=0.9
    ),
    "sampled_top_k_baseline": SampledReverseKL(
        kind="sampled_reverse_kl", kl_baseline=TopKBaseline(kind="top_k", k=K)
    ),
    "sampled_full_baseline": SampledReverseKL(
        kind="sampled_reverse_kl", kl_baseline=FullBaseline(kind="full")
    ),
    "top_k": TopKDivergence(kind="top_k", k=K),
    "full": FullDivergence(kind="full"),
}
WITH_HIDDEN = ("sampled_full_baseline", "full")


@dataclass(frozen=True)
class Case:
    """A batch, and the student's hidden states at each rollout's input tokens."""

    batch: Batch
    hidden: tuple[Tensor, ...]
    """[T, D] each."""


def spans_of(was_sampled: Sequence[bool]) -> list[tuple[int, int]]:
    """Runs of True, as [start, stop)."""
    edges = np.flatnonzero(np.diff([False, *was_sampled, False]))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


patterns = st.lists(st.booleans(), min_size=1, max_size=12).filter(any)
shapes = st.lists(st.tuples(st.integers(1, 5), patterns), min_size=1, max_size=5)


def case_of(shape: list[tuple[int, list[bool]]], name: str, *, task: bool = True) -> Case:
    rng = np.random.default_rng(len(shape))
    scored, hidden = list[ScoredRollout](), list[Tensor]()
    for seed, (prompt, was_sampled) in enumerate(shape):
        draft = synthetic_rollout(prompt, len(was_sampled), seed, sampled=spans_of(was_sampled))
        behavior = -rng.uniform(3, 8, draft.num_loss_tokens)
        rollout = replace(draft, behavior_logprobs=behavior)
        scored.append(ScoredRollout(rollout=rollout, score=score_of(rollout, name, rng)))
        values = rng.normal(size=(prompt + len(was_sampled) - 1, HIDDEN)).astype(np.float32)
        hidden.append(torch.from_numpy(values).requires_grad_())
    batch = Batch(
        scored=tuple(scored),
        importance_weights=rng.uniform(0.3, 2, len(shape)),
        task_advantages=rng.normal(size=len(shape)) * task,
    )
    return Case(batch, tuple(hidden))


def score_of(rollout: Rollout, name: str, rng: np.random.Generator) -> TeacherScore:
    size = rollout.num_loss_tokens
    logprobs = -rng.uniform(3, 8, size)
    if name in WITH_HIDDEN:
        hidden = rng.normal(size=(size, HIDDEN)).astype(np.float32)
        return HiddenScore(teacher_id="t", logprobs=logprobs, hidden=hidden)
    if "top_k" in name:
        ids = np.stack([rng.choice(VOCAB, K, replace=False) for _ in range(size)])
        logs = np.log(rng.dirichlet(np.ones(K + 1), size)[:, :K] + 1e-3).clip(max=0)
        return TopKScore(
            teacher_id="t", logprobs=logprobs, candidate_ids=ids, candidate_logprobs=logs - 0.01
        )
    return TeacherScore(teacher_id="t", logprobs=logprobs)


def split_of(
    case: Case, name: str, max_tokens: int, *, packed: bool, replayed: bool
) -> list[tuple[MicroBatch, list[int]]]:
    """Micro-batches, and the rollouts in each as indices of the batch."""
    if not replayed:
        micros = micro_batches(case.batch, max_tokens, packed=packed)
        return [(micro, list(micro.rollouts)) for micro in micros]
    buffer = ReplayBuffer(
        ReplayConfig(capacity_tokens=200, capacity_rollouts=50),
        candidates=candidates_per_token(OBJECTIVES[name]),
        device=CPU,
        seed=1,
    )
    for _ in range(3):  # the last addition often begins at the ring's start again
        buffer.add(scored_of(case.batch))
    every = buffer.sample(len(buffer), 0)
    newest = every.numbers_S >= 2 * len(case.batch.scored)
    sample = replace(every, places_S=every.places_S[newest], numbers_S=every.numbers_S[newest])
    order = (sample.numbers_S - 2 * len(case.batch.scored)).tolist()
    weights_S = torch.from_numpy(case.batch.importance_weights[order])
    flat = buffer.gather(sample)
    denominator = float(weights_S.numpy().astype(np.float64) @ flat.loss_tokens_S)
    assert denominator == pytest.approx(case.batch.denominator)
    micros = flat_micro_batches(flat, weights_S, max_tokens, packed=packed)
    return [(micro, [order[row] for row in micro.rollouts]) for micro in micros]


def first_positions(micro: MicroBatch) -> list[int]:
    """Where each sequence begins in the flattened [B, T]."""
    if len(micro.input_BT) == 1:
        return [sum(micro.sequence_tokens[:row]) for row in range(len(micro.sequence_tokens))]
    return [row * micro.input_BT.shape[1] for row in range(len(micro.sequence_tokens))]


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    max_tokens=st.sampled_from([1, 20, 1000]),
    packed=st.booleans(),
    replayed=st.booleans(),
)
def test_every_sampled_token_and_no_other_is_laid_out(
    shape: list[tuple[int, list[bool]]], max_tokens: int, packed: bool, replayed: bool
) -> None:
    case = case_of(shape, "top_k")
    for micro, rows in split_of(case, "top_k", max_tokens, packed=packed, replayed=replayed):
        expected: list[tuple[int, int, float, float]] = []
        for first, row in zip(first_positions(micro), rows, strict=True):
            rollout, score = case.batch.scored[row].rollout, scored_of(case.batch)[row].score
            sequence = [*rollout.prompt.token_ids.tolist(), *rollout.response_ids.tolist()]
            stop = first + len(sequence) - 1
            assert micro.input_BT.flatten()[first:stop].tolist() == sequence[:-1]
            assert micro.position_BT.flatten()[first:stop].tolist() == list(range(stop - first))
            expected += zip(
                [first + position for position in sampled_positions(rollout)],
                [sequence[position + 1] for position in sampled_positions(rollout)],
                rollout.behavior_logprobs.tolist(),
                score.logprobs.tolist(),
                strict=True,
            )
        found = zip(
            micro.loss_index_N.tolist(),
            micro.target_N.tolist(),
            micro.behavior_logprob_N.tolist(),
            micro.teacher_logprob_N.tolist(),
            strict=True,
        )
        assert list(found) == expected
        sizes = tuple(case.batch.scored[row].rollout.num_loss_tokens for row in rows)
        assert micro.loss_tokens == sizes
        assert isinstance(scored_of(case.batch)[rows[0]].score, TopKScore)


def laid_out(case: Case, micro: MicroBatch, rows: list[int]) -> Tensor:
    """[B, T, D] the rollouts' hidden states; not a number wherever none belongs."""
    width = micro.input_BT.numel()
    flat = torch.full((width, HIDDEN), torch.nan)
    for first, row in zip(first_positions(micro), rows, strict=True):
        flat = flat.index_copy(
            0, torch.arange(first, first + len(case.hidden[row])), case.hidden[row]
        )
    return flat.view(*micro.input_BT.shape, HIDDEN)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "replayed"),
    [
        *((name, False) for name in OBJECTIVES),
        *((name, True) for name in OBJECTIVES if name not in WITH_HIDDEN),
    ],
)
@settings(max_examples=12, deadline=None)
@given(shape=shapes, max_tokens=st.sampled_from([1, 20, 1000]))
def test_loss_and_gradient_are_those_of_the_formula_in_any_split(
    shape: list[tuple[int, list[bool]]], max_tokens: int, name: str, packed: bool, replayed: bool
) -> None:
    config = OBJECTIVES[name]
    case = case_of(shape, name, task=not replayed)  # replay keeps no task rewards
    objective = build_objective(config, teacher_head_VD=TEACHER_HEAD_VD, chunk_tokens=7)
    total = 0.0
    for micro, rows in split_of(case, name, max_tokens, packed=packed, replayed=replayed):
        hidden_BTD = laid_out(case, micro, rows)
        loss = objective.terms(micro, hidden_BTD, HEAD_VD, case.batch.denominator).loss
        loss.backward()
        total += loss.item()

    expected, gradients = by_hand(case, config)
    assert total == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for hidden, gradient, scored in zip(case.hidden, gradients, case.batch.scored, strict=True):
        assert hidden.grad is not None
        torch.testing.assert_close(hidden.grad, gradient, rtol=1e-3, atol=1e-6)
        others = sorted(set(range(len(hidden))) - set(sampled_positions(scored.rollout)))
        assert not hidden.grad[others].any(), "a token that was not sampled has a gradient"


def by_hand(case: Case, config: ObjectiveConfig) -> tuple[float, list[Tensor]]:
    """The loss of the whole batch and its gradient at each rollout's hidden states."""
    leaves = [hidden.detach().double().requires_grad_() for hidden in case.hidden]
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for index, (leaf, scored) in enumerate(zip(leaves, case.batch.scored, strict=True)):
        logits_SV = leaf[sampled_positions(scored.rollout)] @ HEAD_VD.double().T
        losses = naive_token_losses(
            torch.log_softmax(logits_SV, dim=-1),
            scored,
            config,
            float(case.batch.task_advantages[index]),
            TEACHER_HEAD_VD,
        )
        weight = float(case.batch.importance_weights[index])
        total = total + weight * torch.stack(losses).sum()
        count += weight * len(sampled_ids(scored.rollout))
    assert count == pytest.approx(case.batch.denominator)
    (total / count).backward()
    return (total / count).item(), [leaf.grad.float() for leaf in leaves if leaf.grad is not None]


def test_credit_passes_over_tokens_that_were_not_sampled() -> None:
    """A tool's answer between two sampled tokens does not discount the later one's signal."""
    config = SampledReverseKL(kind="sampled_reverse_kl", ratio_cap=None, discount=0.5)
    magnitudes = list[list[float]]()
    for was_sampled in ([True, True], [True, False, False, True]):
        case = case_of([(2, was_sampled)], "sampled", task=False)
        ((micro, rows),) = split_of(case, "sampled", 99, packed=False, replayed=False)
        hidden_BTD = torch.zeros(1, micro.input_BT.shape[1], HIDDEN)  # log pi = -ln V everywhere
        objective = build_objective(config, teacher_head_VD=None, chunk_tokens=9)
        assert rows == [0]
        terms = objective.terms(micro, hidden_BTD, HEAD_VD, case.batch.denominator)
        magnitudes.append(terms.magnitude_N.tolist())
        signal = scored_of(case.batch)[0].score.logprobs + np.log(VOCAB)
        expected = np.abs([signal[0] + 0.5 * signal[1], signal[1]])
        np.testing.assert_allclose(magnitudes[-1], expected, rtol=1e-5, atol=1e-5)
