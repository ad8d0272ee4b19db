"""The records refuse what does not fit together."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_distill.errors import AlignmentError, DataError
from qwen3_distill.types import (
    Batch,
    Rollout,
    ScoredRollout,
    ScoringJob,
    TeacherScore,
    TokenSpan,
    VersionSpan,
)
from tests.contract.builders import VERSION, make_spec, synthetic_rollout

SPANS = [(0, 2), (3, 6), (9, 10)]
"""Of a response of 10 tokens: 6 of them."""


def rollout_with(
    spans: Sequence[tuple[int, int]], *, num_logprobs: int | None = None, tiled: int | None = None
) -> Rollout:
    """A response of 10 tokens."""
    sampled = tuple(TokenSpan(start=start, stop=stop) for start, stop in spans)
    size = sum(max(span.num_tokens, 0) for span in sampled) or 10
    logprobs = size if num_logprobs is None else num_logprobs
    return replace(
        synthetic_rollout(3, 10),
        sampled=sampled,
        behavior_logprobs=-np.ones(logprobs),
        versions=(VersionSpan(start=0, stop=tiled or logprobs, version=VERSION),),
    )


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 3), (2, 6)],
        [(0, 3), (0, 3)],
        [(0, 3), (3, 6)],
        [(0, 3), (4, 4), (6, 8)],
        [(2, 2)],
        [(4, 3)],
        [(5, 8), (0, 2)],
        [(-1, 3)],
        [(0, 3), (6, 11)],
        [(10, 11)],
    ],
    ids=[
        "overlapping",
        "twice",
        "adjacent",
        "empty",
        "only_empty",
        "backwards",
        "unordered",
        "before_the_response",
        "beyond_the_response",
        "behind_the_response",
    ],
)
def test_spans_that_are_no_account_of_a_response_are_refused(
    spans: list[tuple[int, int]],
) -> None:
    with pytest.raises(AlignmentError, match=r"sampled: spans \[.*all within \[0, 10\)"):
        rollout_with(spans)


@pytest.mark.parametrize("num_logprobs", [5, 7, 10])
def test_there_is_one_logprob_per_sampled_token(num_logprobs: int) -> None:
    with pytest.raises(
        AlignmentError, match=f"6 response tokens were sampled, but there are {num_logprobs} beh"
    ):
        rollout_with(SPANS, num_logprobs=num_logprobs)
    with pytest.raises(AlignmentError, match="10 response tokens were sampled, but there are 6"):
        rollout_with([], num_logprobs=6)


@pytest.mark.parametrize("tiled", [5, 7, 10])
def test_versions_tile_the_sampled_tokens(tiled: int) -> None:
    with pytest.raises(AlignmentError, match="do not tile its 6 sampled tokens"):
        rollout_with(SPANS, tiled=tiled)


def test_a_score_has_one_logprob_per_sampled_token() -> None:
    rollout = rollout_with(SPANS)
    with pytest.raises(AlignmentError, match="6 sampled tokens but 10 scores from t"):
        ScoredRollout(rollout=rollout, score=TeacherScore(teacher_id="t", logprobs=-np.ones(10)))
    fitting = ScoredRollout(
        rollout=rollout, score=TeacherScore(teacher_id="t", logprobs=-np.ones(6))
    )
    whole = ScoredRollout(
        rollout=rollout_with([]), score=TeacherScore(teacher_id="t", logprobs=-np.ones(10))
    )
    batch = replace(Batch.uniform([fitting, whole]), importance_weights=np.array([0.5, 2.0]))
    assert batch.num_loss_tokens == 16
    assert batch.denominator == 0.5 * 6 + 2 * 10


def test_a_response_without_spans_was_sampled_as_a_whole() -> None:
    rollout = rollout_with([])
    assert rollout.sampled == (TokenSpan(start=0, stop=10),)
    assert rollout.num_tokens == rollout.num_loss_tokens == 10
    assert rollout.sampled_indices.tolist() == list(range(10))


@given(st.lists(st.booleans(), min_size=1, max_size=20).filter(any))
def test_any_choice_of_tokens_can_be_told(was_sampled: list[bool]) -> None:
    edges = np.flatnonzero(np.diff([False, *was_sampled, False])).reshape(-1, 2)
    rollout = synthetic_rollout(2, len(was_sampled), sampled=[(int(a), int(b)) for a, b in edges])
    assert rollout.sampled_indices.tolist() == np.flatnonzero(was_sampled).tolist()
    assert rollout.num_tokens == len(was_sampled)
    assert rollout.num_loss_tokens == sum(was_sampled)


def test_a_scored_token_has_one_before_it() -> None:
    ids = np.arange(5)
    job = ScoringJob(
        rollout_id="r",
        token_ids=ids,
        scored=(TokenSpan(start=2, stop=3), TokenSpan(start=4, stop=5)),
    )
    assert job.num_scored == 2
    assert job.scored_indices.tolist() == [2, 4]
    assert job.context_ids.tolist() == [0, 1]
    for start, stop in [(0, 2), (4, 6), (3, 3)]:
        with pytest.raises(AlignmentError, match=r"scoring job of r: scored: .*within \[1, 5\)"):
            ScoringJob(rollout_id="r", token_ids=ids, scored=(TokenSpan(start=start, stop=stop),))


# --- Greedy sampling ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [-1.0, -1e-9, float("nan"), float("inf")])
def test_a_temperature_is_positive_or_zero(temperature: float) -> None:
    with pytest.raises(DataError, match="positive number, or 0 for greedy"):
        make_spec(temperature=temperature)


def test_a_greedy_rollout_cannot_be_trained_on() -> None:
    rollout = synthetic_rollout(3, 10)
    score = TeacherScore(teacher_id="t", logprobs=-np.ones(10))
    assert not rollout.sampling.is_greedy
    ScoredRollout(rollout=rollout, score=score)
    greedy = replace(rollout, sampling=make_spec(temperature=0.0))
    assert greedy.sampling.is_greedy
    with pytest.raises(DataError, match="cannot be trained on"):
        ScoredRollout(rollout=greedy, score=score)
