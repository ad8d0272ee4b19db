"""The view of a teacher with a context of its own, and the comparison with and without it."""

import asyncio
import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_distill.errors import AlignmentError, DataError, HandshakeError
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.ports import TeacherScorer
from qwen3_distill.scoring.context import ContextComparison, ContextView
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.views import SameView
from qwen3_distill.types import (
    Rollout,
    SampledRequest,
    ScoredRollout,
    ScoreFailure,
    ScoreResult,
    ScoringJob,
    TeacherScore,
)
from tests.contract.builders import synthetic_rollout
from tests.tiny_models import TinyModels
from tests.unit.scoring.test_views import rollout_with

VIEW = ContextView()


def told(rollout: Rollout, *teacher_ids: int) -> Rollout:
    """The rollout with a context for the teacher; response tokens before a piece follow."""
    before = rollout.prompt.token_ids[rollout.prompt.token_ids.size - rollout.continues_at :]
    context = np.array([*teacher_ids, *before])
    return replace(rollout, prompt=replace(rollout.prompt, teacher_ids=context))


@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=12),
    st.integers(1, 9),
    st.lists(st.booleans(), min_size=1, max_size=20).filter(any),
)
def test_the_context_is_the_teachers_and_the_scored_tokens_are_the_students(
    context: list[int], prompt_tokens: int, sampled: list[bool]
) -> None:
    rollout = told(rollout_with(prompt_tokens, sampled), *context)
    job = VIEW.job(rollout)
    assert job.token_ids.tolist() == [*context, *rollout.response_ids]
    assert job.num_scored == rollout.num_loss_tokens == sum(sampled)
    expected = rollout.response_ids[rollout.sampled_indices]
    assert job.token_ids[job.scored_indices].tolist() == expected.tolist()
    assert job.context_ids.tolist() == [*context, *rollout.response_ids[: sampled.index(True)]]
    assert job.rollout_id == rollout.rollout_id


def test_a_context_that_is_the_prompt_asks_for_what_the_same_view_asks_for() -> None:
    rollout = rollout_with(5, [True, False, True, True])
    job = VIEW.job(told(rollout, *rollout.prompt.token_ids))
    same = SameView().job(rollout)
    assert job.token_ids.tolist() == same.token_ids.tolist()
    assert job.scored == same.scored


def test_the_same_view_does_not_read_the_teachers_context() -> None:
    rollout = rollout_with(5, [True, True])
    job = SameView().job(told(rollout, 1, 2, 3))
    assert job.token_ids.tolist() == SameView().job(rollout).token_ids.tolist()


def test_requests_of_one_prompt_share_the_context() -> None:
    jobs = [VIEW.job(told(synthetic_rollout(4, 6, seed), 9, 8, 7)) for seed in range(3)]
    assert {tuple(job.context_ids.tolist()) for job in jobs} == {(9, 8, 7)}


def test_a_rollout_without_a_context_is_refused() -> None:
    with pytest.raises(DataError, match=r"no context for the teacher.*set scoring.context to null"):
        VIEW.job(synthetic_rollout(4, 6))


def test_a_result_becomes_the_rollouts_score_or_stays_a_failure() -> None:
    rollout = told(synthetic_rollout(4, 2), 1, 2, 3)
    score = TeacherScore(teacher_id="t", logprobs=np.array([-1.0, -2.0]))
    assert VIEW.scored(rollout, score) == ScoredRollout(rollout=rollout, score=score)
    failure = ScoreFailure(rollout_id=rollout.rollout_id, reason="made up")
    assert VIEW.scored(rollout, failure) is failure


def test_a_teacher_of_another_vocabulary_is_refused(tiny_models: TinyModels) -> None:
    student = load_identity(tiny_models.student)
    VIEW.check(student, load_identity(tiny_models.teacher))
    with pytest.raises(HandshakeError, match="vocab_size"):
        VIEW.check(student, replace(student, vocab_size=1))


# --- Pieces ---------------------------------------------------------------------------------------


def test_a_piece_is_scored_behind_the_context_and_the_tokens_before_it() -> None:
    whole = told(synthetic_rollout(4, 6), 9, 8, 7)
    prompt = whole.prompt.followed_by(whole.response_ids[:4])
    tail = synthetic_rollout(4, 2)
    piece = replace(tail, prompt=prompt, continues_at=4, response_ids=whole.response_ids[4:])
    job = VIEW.job(piece)
    assert job.token_ids.tolist() == VIEW.job(whole).token_ids.tolist()
    assert [(span.start, span.stop) for span in job.scored] == [(7, 9)]


@pytest.mark.parametrize(
    "teacher_ids",
    [
        pytest.param([9, 8, 7], id="no-tokens-before"),
        pytest.param([9, 8, 7, 1, 2, 3], id="one-less"),
        pytest.param([9, 8, 7, 1, 2, 3, 4, 5], id="off-by-one"),
        pytest.param([1, 2, 3, 4], id="nothing-but-them"),
    ],
)
def test_a_piece_whose_teacher_does_not_read_the_tokens_before_it_cannot_be_made(
    teacher_ids: list[int],
) -> None:
    rollout = synthetic_rollout(4, 2)
    prompt = replace(
        rollout.prompt,
        token_ids=np.array([100, 101, 1, 2, 3, 4]),
        teacher_ids=np.array(teacher_ids),
    )
    with pytest.raises(AlignmentError, match="does not end with the 4 tokens before it"):
        replace(rollout, prompt=prompt, continues_at=4)


def test_a_prompt_takes_its_context_to_another_process() -> None:
    prompt = told(synthetic_rollout(4, 2), 9, 8, 7).prompt
    prompt = replace(prompt, messages=(("user", "2+2?"),))
    again = pickle.loads(pickle.dumps(prompt))
    assert again.teacher_ids.tolist() == [9, 8, 7]
    assert again.messages == (("user", "2+2?"),)
    assert prompt.followed_by(np.array([5])).messages == prompt.messages
    assert again.token_ids.tolist() == prompt.token_ids.tolist()
    with pytest.raises(DataError, match="no tokens in teacher_ids"):
        replace(prompt, teacher_ids=np.array([], dtype=np.int32))


# --- The comparison -------------------------------------------------------------------------------


def compared(teacher: TeacherScorer, rollouts: list[Rollout], count: int = 4) -> dict[str, float]:
    comparison = ContextComparison(every_steps=3, num_rollouts=count)
    metrics = asyncio.run(comparison.metrics(teacher, rollouts))
    return {metric.key: metric.value for metric in metrics}


@pytest.fixture(scope="module")
def teacher(tiny_models: TinyModels) -> EmbeddedTeacher:
    return EmbeddedTeacher(
        tiny_models.teacher,
        request=SampledRequest(),
        device="cpu",
        dtype="float32",
        batch_tokens=4096,
        chunk_tokens=64,
    )


def test_the_comparison_is_over_the_tokens_of_both_scores(teacher: EmbeddedTeacher) -> None:
    rollouts = [told(synthetic_rollout(4, 3 + seed, seed), 9, 8, seed) for seed in range(4)]
    found = compared(teacher, rollouts, count=2)
    sample = rollouts[:2]
    results = [
        asyncio.run(teacher.score([view.job(r) for r in sample])) for view in (VIEW, SameView())
    ]
    with_context, without = (
        np.concatenate([r.logprobs for r in scores if isinstance(r, TeacherScore)])
        for scores in results
    )
    assert with_context.size == 7
    assert found["context/with_nats"] == pytest.approx(with_context.mean(), rel=1e-5)
    assert found["context/without_nats"] == pytest.approx(without.mean(), rel=1e-5)
    gap = np.abs(with_context - without).mean()
    assert gap > 0.1
    assert found["context/abs_difference_nats"] == pytest.approx(gap, rel=1e-5)


def test_a_pair_without_both_scores_does_not_count(teacher: EmbeddedTeacher) -> None:
    class FailingTeacher(EmbeddedTeacher):
        def __init__(self) -> None: ...

        async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
            results = await teacher.score(jobs)
            results[0] = ScoreFailure(rollout_id=jobs[0].rollout_id, reason="made up")
            return results

    rollouts = [told(synthetic_rollout(4, 3, seed), 9, 8, seed) for seed in range(2)]
    assert compared(FailingTeacher(), rollouts) == compared(teacher, rollouts[1:])
    assert compared(FailingTeacher(), rollouts[:1]) == {}
    assert compared(teacher, [synthetic_rollout(4, 3)]) == {}


def test_the_comparison_is_made_after_the_first_step_and_every_so_many() -> None:
    comparison = ContextComparison(every_steps=3, num_rollouts=1)
    assert [step for step in range(1, 10) if comparison.is_due(step)] == [1, 3, 6, 9]
