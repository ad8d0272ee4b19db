"""Shift, lay out, split: values that encode their own index make an off-by-one a wrong number."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3_distill.errors import AlignmentError
from qwen3_distill.training.batching import (
    HiddenMicroBatch,
    MicroBatch,
    TopKMicroBatch,
    collate,
    micro_batches,
)
from qwen3_distill.types import (
    Batch,
    FinishReason,
    HiddenScore,
    Prompt,
    Rollout,
    SamplingSpec,
    ScoredRollout,
    TeacherScore,
    TokenSpan,
    TopKScore,
    VersionSpan,
    WeightVersion,
)

VERSION = WeightVersion(step=3, digest="d")


def rollout(row: int, prompt_tokens: int, response_tokens: int) -> Rollout:
    """Token and logprob r of row b say 100 b + r."""
    r = np.arange(response_tokens)
    return Rollout(
        rollout_id=f"r{row}",
        prompt=Prompt(prompt_id=f"p{row}", token_ids=np.arange(prompt_tokens) + 900),
        sampling=SamplingSpec(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=99, seed=row),
        response_ids=100 * row + r,
        behavior_logprobs=-(100 * row + r + 1) / 1000,
        versions=(VersionSpan(start=0, stop=response_tokens, version=VERSION),),
        finish_reason=FinishReason.LENGTH,
    )


def scored(row: int, prompt_tokens: int, response_tokens: int) -> ScoredRollout:
    source = rollout(row, prompt_tokens, response_tokens)
    score = TeacherScore(teacher_id="t", logprobs=2 * source.behavior_logprobs)
    return ScoredRollout(rollout=source, score=score)


SHAPES = [(3, 4), (1, 1), (5, 2), (2, 9)]
BATCH = Batch(
    scored=tuple(scored(row, p, r) for row, (p, r) in enumerate(SHAPES)),
    importance_weights=np.array([1, 2, 3, 4]),
    task_advantages=np.array([0.1, 0.2, 0.3, 0.4]),
)


def sequence(row: int) -> list[int]:
    prompt_tokens, response_tokens = SHAPES[row]
    return [*range(900, 900 + prompt_tokens), *range(100 * row, 100 * row + response_tokens)]


def check_alignment(micro: MicroBatch, rows: list[int]) -> None:
    """Each value stands beside its own target, and each target after its own input."""
    inputs, positions = micro.input_BT.flatten(), micro.position_BT.flatten()
    starts = iter(micro.loss_index_N.split(list(micro.loss_tokens)))
    targets = iter(micro.target_N.split(list(micro.loss_tokens)))
    behavior = iter(micro.behavior_logprob_N.split(list(micro.loss_tokens)))
    teacher = iter(micro.teacher_logprob_N.split(list(micro.loss_tokens)))
    for row in rows:
        prompt_tokens, response_tokens = SHAPES[row]
        index = next(starts)
        # The whole sequence stands around its loss tokens, at positions that start with 0.
        first = int(index[0]) - (prompt_tokens - 1)
        stop = first + prompt_tokens + response_tokens - 1
        assert inputs[first:stop].tolist() == sequence(row)[:-1]
        assert positions[first:stop].tolist() == list(range(stop - first))
        assert index.tolist() == list(range(stop - response_tokens, stop))
        ids = torch.arange(100 * row, 100 * row + response_tokens)
        assert next(targets).tolist() == ids.tolist()
        assert inputs[index].tolist() == [900 + prompt_tokens - 1, *ids[:-1].tolist()]
        torch.testing.assert_close(next(behavior), -(ids + 1) / 1000)
        torch.testing.assert_close(next(teacher), -(ids + 1) / 500)


@pytest.mark.parametrize("packed", [False, True])
def test_every_value_stands_at_its_own_target(packed: bool) -> None:
    check_alignment(collate(BATCH, [0, 1, 2, 3], packed=packed), [0, 1, 2, 3])


def test_a_padded_row_each_or_all_in_one_row() -> None:
    padded, packed = (collate(BATCH, [0, 2, 3], packed=packed) for packed in (False, True))
    assert padded.input_BT.shape == (3, 10)
    assert packed.input_BT.shape == (1, 6 + 6 + 10)
    for micro in (padded, packed):
        assert micro.sequence_tokens == (6, 6, 10)
        assert micro.loss_tokens == (4, 2, 9)


@pytest.mark.parametrize("packed", [False, True])
def test_a_response_that_was_sampled_as_a_whole_has_these_tensors(packed: bool) -> None:
    """Bit for bit those of the code that knew no sampled spans."""
    micro = collate(BATCH, [1, 0], packed=packed)
    if packed:
        assert micro.input_BT.tolist() == [[900, 900, 901, 902, 0, 1, 2]]
        assert micro.position_BT.tolist() == [[0, 0, 1, 2, 3, 4, 5]]
        assert micro.loss_index_N.tolist() == [0, 3, 4, 5, 6]
    else:
        assert micro.input_BT.tolist() == [[900, 0, 0, 0, 0, 0], [900, 901, 902, 0, 1, 2]]
        assert micro.position_BT.tolist() == [[0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]]
        assert micro.loss_index_N.tolist() == [0, 8, 9, 10, 11]
    assert micro.rollouts == (1, 0)
    assert micro.sequence_tokens == (1, 6)
    assert micro.loss_tokens == (1, 4)
    assert micro.target_N.tolist() == [100, 0, 1, 2, 3]
    behavior = torch.tensor([-0.101, -0.001, -0.002, -0.003, -0.004])
    assert torch.equal(micro.behavior_logprob_N, behavior)
    assert torch.equal(micro.teacher_logprob_N, 2 * behavior)
    assert micro.importance_weight_N.tolist() == [2, 1, 1, 1, 1]
    assert torch.equal(micro.task_advantage_N, torch.tensor([0.2, 0.1, 0.1, 0.1, 0.1]))
    integers = (micro.input_BT, micro.position_BT, micro.loss_index_N, micro.target_N)
    assert {tensor.dtype for tensor in integers} == {torch.int64}


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_that_were_not_sampled_are_inputs_only(packed: bool) -> None:
    """Of 9 response tokens, the first, the fifth and sixth and the last were sampled."""
    spans = (TokenSpan(start=0, stop=1), TokenSpan(start=4, stop=6), TokenSpan(start=8, stop=9))
    whole = BATCH.scored[3].rollout
    kept = [0, 4, 5, 8]
    rollout = replace(
        whole,
        sampled=spans,
        behavior_logprobs=whole.behavior_logprobs[kept],
        versions=(VersionSpan(start=0, stop=4, version=VERSION),),
    )
    score = TeacherScore(teacher_id="t", logprobs=2 * rollout.behavior_logprobs)
    batch = replace(BATCH, scored=(*BATCH.scored[:3], ScoredRollout(rollout=rollout, score=score)))
    assert batch.num_loss_tokens == 4 + 1 + 2 + 4
    assert batch.denominator == 1 * 4 + 2 * 1 + 3 * 2 + 4 * 4
    micro = collate(batch, [3, 0], packed=packed)
    before = collate(BATCH, [3, 0], packed=packed)
    assert torch.equal(micro.input_BT, before.input_BT)
    assert torch.equal(micro.position_BT, before.position_BT)
    assert micro.sequence_tokens == (10, 6)
    assert micro.loss_tokens == (4, 4)
    # The prompt has 2 tokens: response token t is predicted at position t + 1.
    first = 10
    assert micro.loss_index_N.tolist() == [1, 5, 6, 9, *(first + t for t in (2, 3, 4, 5))]
    assert micro.target_N.tolist() == [300, 304, 305, 308, 0, 1, 2, 3]
    assert micro.importance_weight_N.tolist() == [4] * 4 + [1] * 4
    expected = -torch.tensor([301, 305, 306, 309, 1, 2, 3, 4]) / 1000
    torch.testing.assert_close(micro.behavior_logprob_N, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_values_of_a_rollout_follow_it(packed: bool) -> None:
    micro = collate(BATCH, [3, 1], packed=packed)
    check_alignment(micro, [3, 1])
    assert micro.importance_weight_N.tolist() == [4] * 9 + [2]
    torch.testing.assert_close(micro.task_advantage_N, torch.tensor([0.4] * 9 + [0.2]))
    hidden_BTD = torch.arange(micro.input_BT.numel()).view(*micro.input_BT.shape, 1)
    assert micro.at_loss_tokens(hidden_BTD).flatten().tolist() == micro.loss_index_N.tolist()


@given(st.integers(min_value=1, max_value=60), st.booleans())
def test_a_split_keeps_every_token_once(max_tokens: int, packed: bool) -> None:
    split = list(micro_batches(BATCH, max_tokens, packed=packed))
    seen = torch.cat([micro.target_N for micro in split])
    expected = [100 * row + r for row, (_, size) in enumerate(SHAPES) for r in range(size)]
    assert sorted(seen.tolist()) == expected
    for micro in split:
        assert micro.input_BT.numel() <= max_tokens or len(micro.sequence_tokens) == 1
        assert len(micro.input_BT) == 1 if packed else len(micro.sequence_tokens)


def test_packing_leaves_no_room_that_a_sequence_would_fill() -> None:
    # 10 + 1, 6 + 6: with padding the two of 6 fit as well, the 10 and the 1 do not.
    assert [m.sequence_tokens for m in micro_batches(BATCH, 12, packed=True)] == [(10, 1), (6, 6)]
    assert [m.sequence_tokens for m in micro_batches(BATCH, 12)] == [(10,), (6, 6), (1,)]


def test_top_k_and_hidden_values_stand_at_their_own_target() -> None:
    base = rollout(1, 2, 3)
    ids = np.array([[10, 11], [12, 13], [14, 15]])
    top_k = TopKScore(
        teacher_id="t",
        logprobs=base.behavior_logprobs,
        candidate_ids=ids,
        candidate_logprobs=-ids / 10,
    )
    micro = collate(Batch.uniform([ScoredRollout(rollout=base, score=top_k)]), [0])
    assert isinstance(micro, TopKMicroBatch)
    assert micro.candidate_id_NK.tolist() == ids.tolist()
    torch.testing.assert_close(micro.candidate_logprob_NK, torch.tensor(-ids / 10).float())
    hidden = HiddenScore(teacher_id="t", logprobs=base.behavior_logprobs, hidden=ids)
    micro = collate(Batch.uniform([ScoredRollout(rollout=base, score=hidden)]), [0])
    assert isinstance(micro, HiddenMicroBatch)
    assert micro.teacher_hidden_ND.tolist() == ids.tolist()


def test_mixed_kinds_of_score_are_refused() -> None:
    base = rollout(0, 2, 3)
    hidden = HiddenScore(teacher_id="t", logprobs=base.behavior_logprobs, hidden=np.zeros((3, 2)))
    batch = Batch.uniform([scored(1, 2, 2), ScoredRollout(rollout=base, score=hidden)])
    with pytest.raises(AlignmentError, match="several kinds"):
        collate(batch, [0, 1])


def test_to_moves_every_field() -> None:
    moved = collate(BATCH, [0, 1]).to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.loss_tokens == (4, 1)
