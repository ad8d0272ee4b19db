"""Views: from a rollout to a scoring job, and from its result back to the rollout."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_distill.errors import AlignmentError, HandshakeError
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.scoring.views import SameView
from qwen3_distill.types import Rollout, ScoredRollout, ScoreFailure, TeacherScore, TokenSpan
from tests.contract.builders import synthetic_rollout
from tests.tiny_models import TinyModels

VIEW = SameView()


def rollout_with(prompt_tokens: int, sampled: list[bool]) -> Rollout:
    """A rollout whose response tokens were sampled or not."""
    edges = np.flatnonzero(np.diff(np.array([False, *sampled, False]).astype(int)))
    whole = synthetic_rollout(prompt_tokens, len(sampled))
    return replace(
        whole,
        behavior_logprobs=whole.behavior_logprobs[: sum(sampled)],
        versions=(replace(whole.versions[0], stop=sum(sampled)),),
        sampled=tuple(
            TokenSpan(start=int(start), stop=int(stop)) for start, stop in edges.reshape(-1, 2)
        ),
    )


def test_a_job_is_prompt_and_response_with_the_sampled_tokens_scored() -> None:
    job = VIEW.job(rollout_with(4, [True, True, False, False, True]))
    rollout = synthetic_rollout(4, 5)
    assert job.token_ids.tolist() == [*rollout.prompt.token_ids, *rollout.response_ids]
    assert [(span.start, span.stop) for span in job.scored] == [(4, 6), (8, 9)]
    assert job.rollout_id == rollout.rollout_id


@given(st.integers(1, 9), st.lists(st.booleans(), min_size=1, max_size=20).filter(any))
def test_the_scored_tokens_are_the_sampled_ones(prompt_tokens: int, sampled: list[bool]) -> None:
    rollout = rollout_with(prompt_tokens, sampled)
    job = VIEW.job(rollout)
    assert job.num_scored == rollout.num_loss_tokens == sum(sampled)
    expected = rollout.response_ids[rollout.sampled_indices]
    assert job.token_ids[job.scored_indices].tolist() == expected.tolist()
    context = [*rollout.prompt.token_ids, *rollout.response_ids[: sampled.index(True)]]
    assert job.context_ids.tolist() == context


def test_a_result_becomes_the_rollouts_score_or_stays_a_failure() -> None:
    rollout = rollout_with(4, [True, False, True])
    score = TeacherScore(teacher_id="t", logprobs=np.array([-1.0, -2.0]))
    assert VIEW.scored(rollout, score) == ScoredRollout(rollout=rollout, score=score)
    failure = ScoreFailure(rollout_id=rollout.rollout_id, reason="made up")
    assert VIEW.scored(rollout, failure) is failure
    per_response_token = TeacherScore(teacher_id="t", logprobs=np.full(3, -1.0))
    with pytest.raises(AlignmentError, match="2 sampled tokens but 3 scores"):
        VIEW.scored(rollout, per_response_token)


def test_the_view_of_the_same_tokens_asks_for_the_same_tokenizer(tiny_models: TinyModels) -> None:
    student = load_identity(tiny_models.student)
    VIEW.check(student, load_identity(tiny_models.teacher))
    with pytest.raises(HandshakeError, match="vocab_size"):
        VIEW.check(student, replace(student, vocab_size=1))
