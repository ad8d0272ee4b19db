"""Pieces of a rollout: together they are the rollout, and each is a rollout."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.errors import DataError
from qwen3_distill.pipeline.harvest import harvested, remainder
from qwen3_distill.types import (
    FinishReason,
    Prompt,
    Rollout,
    RolloutPrefix,
    RolloutRequest,
    SamplingSpec,
    TokenSpan,
    VersionSpan,
    WeightVersion,
)

VERSIONS = [WeightVersion(step=step, digest=str(step)) for step in range(4)]


def rollout_of(tokens: int, edges: list[int]) -> Rollout:
    bounds = [0, *sorted(set(edges)), tokens]
    spans = [(a, b) for a, b in pairwise(bounds) if a < b]
    return Rollout(
        rollout_id="step-000001/prompt-0002/sample-00",
        prompt=Prompt(prompt_id="p", token_ids=np.array([1, 2, 3]), task_data={"answer": "4"}),
        sampling=SamplingSpec(temperature=1, top_p=1, top_k=0, max_new_tokens=64, seed=3),
        response_ids=np.arange(100, 100 + tokens),
        behavior_logprobs=-np.arange(1, tokens + 1, dtype=np.float32),
        versions=tuple(
            VersionSpan(start=a, stop=b, version=VERSIONS[i]) for i, (a, b) in enumerate(spans)
        ),
        finish_reason=FinishReason.STOP,
        candidate_ids=np.arange(2 * tokens).reshape(tokens, 2),
    )


def prefix_of(rollout: Rollout, stop: int) -> RolloutPrefix:
    return RolloutPrefix(
        request=RolloutRequest(
            rollout_id=rollout.rollout_id, prompt=rollout.prompt, sampling=rollout.sampling
        ),
        response_ids=rollout.response_ids[:stop],
        behavior_logprobs=rollout.behavior_logprobs[:stop],
        versions=tuple(
            VersionSpan(start=s.start, stop=min(s.stop, stop), version=s.version)
            for s in rollout.versions
            if s.start < stop
        ),
        candidate_ids=None if rollout.candidate_ids is None else rollout.candidate_ids[:stop],
    )


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(1, 40),
    edges=st.lists(st.integers(1, 39), max_size=3),
    cuts=st.lists(st.integers(1, 39), max_size=4),
)
def test_pieces_hold_every_token_once_with_its_logprob_version_and_context(
    tokens: int, edges: list[int], cuts: list[int]
) -> None:
    whole = rollout_of(tokens, [edge for edge in edges if edge < tokens])
    pieces: list[Rollout] = []
    start = 0
    for cut in sorted({cut for cut in cuts if cut <= tokens}):
        pieces.append(harvested(prefix_of(whole, cut), start))
        start = cut
    last = remainder(whole, start)
    pieces += [] if last is None else [last]
    assert np.array_equal(np.concatenate([p.response_ids for p in pieces]), whole.response_ids)
    logprobs = np.concatenate([p.behavior_logprobs for p in pieces])
    assert np.array_equal(logprobs, whole.behavior_logprobs)
    candidates = [p.candidate_ids for p in pieces if p.candidate_ids is not None]
    assert whole.candidate_ids is not None
    assert np.array_equal(np.concatenate(candidates), whole.candidate_ids)
    assert version_of_tokens(*pieces) == version_of_tokens(whole)
    everything = [*whole.prompt.token_ids, *whole.response_ids]
    for piece in pieces:
        seen = [*piece.prompt.token_ids, *piece.response_ids]
        assert seen == everything[: len(seen)]
        assert piece.continues_at == piece.prompt.token_ids.size - whole.prompt.token_ids.size
        assert piece.prompt.task_data == whole.prompt.task_data
    assert len({piece.rollout_id for piece in pieces}) == len(pieces)
    ends = [piece.finish_reason for piece in pieces]
    assert FinishReason.HARVESTED not in ends[-1:] or last is None
    assert all(end is FinishReason.HARVESTED for end in ends[:-1])


def version_of_tokens(*rollouts: Rollout) -> list[WeightVersion]:
    return [
        span.version
        for rollout in rollouts
        for span in rollout.versions
        for _ in range(span.start, span.stop)
    ]


def test_a_rollout_that_was_never_harvested_stays_as_it_is() -> None:
    whole = rollout_of(5, [])
    assert remainder(whole, 0) is whole
    assert whole.is_whole
    assert not harvested(prefix_of(whole, 5), 0).is_whole
    rest = remainder(whole, 2)
    assert rest is not None
    assert not rest.is_whole


def test_a_response_that_was_sampled_in_parts_is_not_cut() -> None:
    whole = replace(
        rollout_of(7, []),
        sampled=(TokenSpan(start=0, stop=3), TokenSpan(start=5, stop=7)),
        behavior_logprobs=-np.ones(5, dtype=np.float32),
        versions=(VersionSpan(start=0, stop=5, version=VERSIONS[0]),),
        candidate_ids=None,
    )
    assert remainder(whole, 0) is whole
    for start in (3, 7):
        with pytest.raises(
            DataError,
            match=r"sample-00: 5 of its 7 response tokens were sampled.*pipeline\.harvest",
        ):
            remainder(whole, start)


def test_a_piece_is_as_old_as_its_own_oldest_token() -> None:
    whole = rollout_of(9, [3, 6])
    rest = remainder(whole, 4)
    assert rest is not None
    assert [r.oldest_version and r.oldest_version.step for r in (whole, rest)] == [0, 1]
