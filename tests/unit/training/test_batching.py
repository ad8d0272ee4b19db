"""Shift, pad, split: values that encode their own index make an off-by-one a wrong number."""

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


def check_alignment(micro: MicroBatch, rows: list[int]) -> None:
    for b, row in enumerate(rows):
        prompt_tokens, response_tokens = SHAPES[row]
        mask = micro.loss_mask_BT[b]
        assert mask.nonzero().flatten().tolist() == list(
            range(prompt_tokens - 1, prompt_tokens - 1 + response_tokens)
        )
        ids = torch.arange(100 * row, 100 * row + response_tokens)
        assert micro.target_BT[b][mask].tolist() == ids.tolist()
        # The input of a target is the token before it.
        assert micro.input_BT[b][mask].tolist() == [900 + prompt_tokens - 1, *ids[:-1].tolist()]
        torch.testing.assert_close(micro.behavior_logprob_BT[b][mask], -(ids + 1) / 1000)
        torch.testing.assert_close(micro.teacher_logprob_BT[b][mask], -(ids + 1) / 500)


def test_every_value_stands_at_its_own_target() -> None:
    check_alignment(collate(BATCH, [0, 1, 2, 3]), [0, 1, 2, 3])


def test_row_values_follow_their_row() -> None:
    micro = collate(BATCH, [3, 1])
    check_alignment(micro, [3, 1])
    assert micro.importance_weight_B.tolist() == [4, 2]
    torch.testing.assert_close(micro.task_advantage_B, torch.tensor([0.4, 0.2]))
    assert micro.per_token(micro.importance_weight_B).tolist() == [4] * 9 + [2]
    assert micro.tokens_per_row == [9, 1]


@given(st.integers(min_value=1, max_value=60))
def test_a_split_keeps_every_token_once(max_tokens: int) -> None:
    split = micro_batches(BATCH, max_tokens)
    seen = torch.cat([micro.target_BT[micro.loss_mask_BT] for micro in split])
    expected = [100 * row + r for row, (_, size) in enumerate(SHAPES) for r in range(size)]
    assert sorted(seen.tolist()) == expected
    for micro in split:
        assert micro.input_BT.numel() <= max_tokens or len(micro.input_BT) == 1


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
    assert micro.candidate_id_BTK[micro.loss_mask_BT].tolist() == ids.tolist()
    hidden = HiddenScore(teacher_id="t", logprobs=base.behavior_logprobs, hidden=ids)
    micro = collate(Batch.uniform([ScoredRollout(rollout=base, score=hidden)]), [0])
    assert isinstance(micro, HiddenMicroBatch)
    assert micro.teacher_hidden_BTD[micro.loss_mask_BT].tolist() == ids.tolist()


def test_mixed_kinds_of_score_are_refused() -> None:
    base = rollout(0, 2, 3)
    hidden = HiddenScore(teacher_id="t", logprobs=base.behavior_logprobs, hidden=np.zeros((3, 2)))
    batch = Batch.uniform([scored(1, 2, 2), ScoredRollout(rollout=base, score=hidden)])
    with pytest.raises(AlignmentError, match="several kinds"):
        collate(batch, [0, 1])


def test_to_moves_every_field() -> None:
    moved = collate(BATCH, [0, 1]).to(torch.device("meta"))
    assert {value.device.type for value in vars(moved).values()} == {"meta"}
