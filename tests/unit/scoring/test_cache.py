"""The score cache: what is kept, what is asked for, and what a damaged row does."""

import asyncio
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from qwen3_distill.errors import RunFolderError
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.ports import STORED_TOKENS
from qwen3_distill.scoring import cache
from qwen3_distill.scoring.cache import CachedTeacher, score_key
from qwen3_distill.types import (
    GivenCandidatesRequest,
    HiddenRequest,
    HiddenScore,
    SampledRequest,
    ScoreFailure,
    ScoreRequest,
    ScoreResult,
    ScoringJob,
    TeacherScore,
    TokenSpan,
    TopKRequest,
    TopKScore,
)
from tests.contract.builders import jobs_of, synthetic_rollout
from tests.tiny_models import TinyModels

ROLLOUTS = [synthetic_rollout(3, 4, seed) for seed in range(5)]
JOBS = jobs_of(ROLLOUTS)
SAMPLED = SampledRequest()
OTHER_SPANS = [[(3, 4), (5, 7)], [(3, 5), (6, 7)], [(3, 6)], [(3, 4), (5, 6)], [(1, 2), (3, 7)]]
"""None of them is one span to the end of the 7 tokens."""


def with_spans(job: ScoringJob, *spans: tuple[int, int]) -> ScoringJob:
    return replace(job, scored=tuple(TokenSpan(start=start, stop=stop) for start, stop in spans))


class FakeTeacher:
    """Scores carry the rollout's seed and a counter of calls; some rollouts fail."""

    counters: Mapping[str, float] = MappingProxyType({"score/own": 1.0})

    max_dropped_fraction = 0.25
    starts_first = True

    async def memory_taken(self) -> None:
        raise AssertionError("nobody waits for it")

    def __init__(self, models: TinyModels, request: ScoreRequest, name: str = "fake#1") -> None:
        self.identity = load_identity(models.teacher)
        self.teacher_id = name
        self.asked: list[str] = []
        self.failing: set[str] = set()
        self._request = request

    async def start(self) -> None:
        return None

    async def close(self) -> None:
        return None

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        self.asked += [job.rollout_id for job in jobs]
        return [self._score(job) for job in jobs]

    def _score(self, job: ScoringJob) -> ScoreResult:
        if job.rollout_id in self.failing:
            return ScoreFailure(rollout_id=job.rollout_id, reason="made up")
        size = job.num_scored
        logprobs = -(job.token_ids[job.scored_indices] + 1.0 / 3) / 100
        match self._request:
            case SampledRequest():
                return TeacherScore(teacher_id=self.teacher_id, logprobs=logprobs)
            case TopKRequest(k=k):
                return TopKScore(
                    teacher_id=self.teacher_id,
                    logprobs=logprobs,
                    candidate_ids=np.arange(size * k).reshape(size, k),
                    candidate_logprobs=-np.arange(size * k).reshape(size, k) / 7,
                )
            case GivenCandidatesRequest():
                assert job.candidate_ids is not None
                return TopKScore(
                    teacher_id=self.teacher_id,
                    logprobs=logprobs,
                    candidate_ids=job.candidate_ids,
                    candidate_logprobs=-job.candidate_ids / 7,
                )
            case HiddenRequest():
                return HiddenScore(
                    teacher_id=self.teacher_id,
                    logprobs=logprobs,
                    hidden=np.arange(size * 3).reshape(size, 3) / 7,
                )


def ask(teacher: CachedTeacher, jobs: Sequence[ScoringJob] = JOBS) -> list[ScoreResult]:
    async def work() -> list[ScoreResult]:
        await teacher.start()
        try:
            return await teacher.score(jobs)
        finally:
            await teacher.close()

    return asyncio.run(work())


def assert_same(left: ScoreResult, right: ScoreResult) -> None:
    """Bit for bit."""
    assert type(left) is type(right)
    for name in ("teacher_id", "logprobs", "candidate_ids", "candidate_logprobs", "hidden"):
        assert np.array_equal(getattr(left, name, 0), getattr(right, name, 0)), name


@pytest.mark.parametrize(
    "request_kind", [SAMPLED, TopKRequest(k=3), HiddenRequest()], ids=["sampled", "top_k", "hidden"]
)
def test_a_second_run_gets_the_same_scores_without_the_teacher(
    tiny_models: TinyModels, tmp_path: Path, request_kind: ScoreRequest
) -> None:
    first = FakeTeacher(tiny_models, request_kind)
    scores = ask(CachedTeacher(first, request_kind, tmp_path))
    second = FakeTeacher(tiny_models, request_kind)
    cached = CachedTeacher(second, request_kind, tmp_path)
    for found, expected in zip(ask(cached), scores, strict=True):
        assert_same(found, expected)
    assert len(first.asked) == len(ROLLOUTS)
    assert second.asked == []
    assert cached.counters == {
        "score/own": 1,
        cache.HITS: len(ROLLOUTS),
        cache.MISSES: 0,
        cache.DAMAGED: 0,
        STORED_TOKENS: sum(job.token_ids.size for job in JOBS),
    }


def test_other_candidates_of_the_same_tokens_are_another_score(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    request = GivenCandidatesRequest(k=2)
    for first_id in (5, 9, 5):
        jobs = [
            replace(job, candidate_ids=np.tile([first_id, 1], (job.num_scored, 1))) for job in JOBS
        ]
        scores = ask(CachedTeacher(FakeTeacher(tiny_models, request), request, tmp_path), jobs)
        for score in scores:
            assert isinstance(score, TopKScore)
            assert (score.candidate_ids[:, 0] == first_id).all()
            assert np.allclose(score.candidate_logprobs, -score.candidate_ids / 7)


def test_only_what_is_missing_is_asked_for_and_the_order_is_kept(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    ask(CachedTeacher(FakeTeacher(tiny_models, SAMPLED), SAMPLED, tmp_path), JOBS[1:3])
    teacher = FakeTeacher(tiny_models, SAMPLED)
    cached = CachedTeacher(teacher, SAMPLED, tmp_path)
    found = ask(cached, JOBS)
    assert teacher.asked == [ROLLOUTS[i].rollout_id for i in (0, 3, 4)]
    for score, job in zip(found, JOBS, strict=True):
        assert_same(score, teacher._score(job))
    assert (cached.counters[cache.HITS], cached.counters[cache.MISSES]) == (2, 3)


def test_a_failure_is_not_kept(tiny_models: TinyModels, tmp_path: Path) -> None:
    teacher = FakeTeacher(tiny_models, SAMPLED)
    cached = CachedTeacher(teacher, SAMPLED, tmp_path)
    teacher.failing = {ROLLOUTS[0].rollout_id}
    assert isinstance(ask(cached)[0], ScoreFailure)
    teacher.failing = set()
    assert isinstance(ask(cached)[0], TeacherScore)
    assert teacher.asked.count(ROLLOUTS[0].rollout_id) == 2
    assert teacher.asked.count(ROLLOUTS[1].rollout_id) == 1


def test_another_teacher_has_its_own_scores(tiny_models: TinyModels, tmp_path: Path) -> None:
    ask(CachedTeacher(FakeTeacher(tiny_models, SAMPLED), SAMPLED, tmp_path))
    other = FakeTeacher(tiny_models, SAMPLED, name="fake#2")
    ask(CachedTeacher(other, SAMPLED, tmp_path))
    assert len(other.asked) == len(ROLLOUTS)


def test_a_key_covers_everything_that_a_score_depends_on() -> None:
    rollout = ROLLOUTS[0]
    hot = replace(rollout, rollout_id="other", sampling=replace(rollout.sampling, temperature=2.0))
    prompt = rollout.prompt
    moved = replace(  # the same tokens, one of them moved from the response to the prompt
        rollout,
        prompt=replace(prompt, token_ids=np.append(prompt.token_ids, rollout.response_ids[0])),
        response_ids=rollout.response_ids[1:],
        behavior_logprobs=rollout.behavior_logprobs[1:],
        versions=(replace(rollout.versions[0], stop=rollout.num_tokens - 1),),
        sampled=(),
    )
    job, moved_job, hot_job = jobs_of([rollout, moved, hot])
    keys = [
        score_key("a", SAMPLED, job),
        score_key("b", SAMPLED, job),
        score_key("a", TopKRequest(k=3), job),
        score_key("a", TopKRequest(k=4), job),
        score_key("a", SAMPLED, JOBS[1]),
        score_key("a", SAMPLED, moved_job),
        *(score_key("a", SAMPLED, with_spans(job, *spans)) for spans in OTHER_SPANS),
    ]
    assert len(set(keys)) == len(keys)
    assert score_key("a", SAMPLED, hot_job) == keys[0]


def test_the_key_of_a_job_with_one_span_to_its_end_never_changes() -> None:
    """Kept scores are found again by later versions of this package."""
    keys = [
        score_key("a", SAMPLED, JOBS[0]).hex(),
        score_key("teacher#1@fp8", TopKRequest(k=3), JOBS[0]).hex(),
    ]
    assert keys == [
        "fceb01604008d17a23a61f83bc82a0a6a4463033c5b40ff2125e8aedfadefefc",
        "5b40fd3a1384e1fdae3a15aec61a19919bc4bc3e6627cce311b788b0f08d944c",
    ]


@pytest.mark.parametrize(
    "request_kind", [SAMPLED, TopKRequest(k=3), HiddenRequest()], ids=["sampled", "top_k", "hidden"]
)
def test_scores_of_several_spans_are_kept(
    tiny_models: TinyModels, tmp_path: Path, request_kind: ScoreRequest
) -> None:
    jobs = [with_spans(JOBS[0], *spans) for spans in OTHER_SPANS]
    scores = ask(
        CachedTeacher(FakeTeacher(tiny_models, request_kind), request_kind, tmp_path), jobs
    )
    second = FakeTeacher(tiny_models, request_kind)
    found = ask(CachedTeacher(second, request_kind, tmp_path), jobs)
    for score, expected, job in zip(found, scores, jobs, strict=True):
        assert_same(score, expected)
        assert isinstance(score, TeacherScore)
        assert score.logprobs.size == job.num_scored
    assert second.asked == []


def test_a_cache_drops_and_starts_as_its_teacher(tiny_models: TinyModels, tmp_path: Path) -> None:
    cached = CachedTeacher(FakeTeacher(tiny_models, SAMPLED), SAMPLED, tmp_path)
    assert (cached.max_dropped_fraction, cached.starts_first) == (0.25, True)


def test_a_damaged_row_is_scored_again(tiny_models: TinyModels, tmp_path: Path) -> None:
    expected = ask(CachedTeacher(FakeTeacher(tiny_models, SAMPLED), SAMPLED, tmp_path))
    with sqlite3.connect(tmp_path / cache.FILE_NAME) as database:
        key = score_key("fake#1", SAMPLED, JOBS[2])
        (blob,) = database.execute("SELECT score FROM scores WHERE key = ?", [key]).fetchone()
        broken = bytes([blob[0] ^ 1, *blob[1:]])
        database.execute("UPDATE scores SET score = ? WHERE key = ?", [broken, key])
    database.close()
    teacher = FakeTeacher(tiny_models, SAMPLED)
    cached = CachedTeacher(teacher, SAMPLED, tmp_path)
    for found, score in zip(ask(cached), expected, strict=True):
        assert_same(found, score)
    assert teacher.asked == [ROLLOUTS[2].rollout_id]
    assert cached.counters[cache.DAMAGED] == 1
    healed = CachedTeacher(FakeTeacher(tiny_models, SAMPLED), SAMPLED, tmp_path)
    ask(healed)
    assert healed.counters[cache.HITS] == len(ROLLOUTS)


def test_more_rollouts_than_one_query_takes(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_KEYS_PER_QUERY", 2)
    ask(CachedTeacher(FakeTeacher(tiny_models, SAMPLED), SAMPLED, tmp_path))
    teacher = FakeTeacher(tiny_models, SAMPLED)
    ask(CachedTeacher(teacher, SAMPLED, tmp_path))
    assert teacher.asked == []


def test_two_teachers_may_use_one_file_at_a_time(tiny_models: TinyModels, tmp_path: Path) -> None:
    one = CachedTeacher(FakeTeacher(tiny_models, SAMPLED), SAMPLED, tmp_path)
    inner = FakeTeacher(tiny_models, SAMPLED)
    other = CachedTeacher(inner, SAMPLED, tmp_path)

    async def work() -> None:
        await asyncio.gather(one.start(), other.start())
        await one.score(JOBS[:3])
        await other.score(JOBS)
        await asyncio.gather(one.close(), other.close())

    asyncio.run(work())
    assert len(inner.asked) == 2


def test_a_folder_that_cannot_be_used_is_named(tiny_models: TinyModels, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / cache.FILE_NAME).write_text("not a database, but long enough to be looked at" * 99)
    for folder in (tmp_path / "file", tmp_path):
        teacher = CachedTeacher(FakeTeacher(tiny_models, SAMPLED), SAMPLED, folder)
        with pytest.raises(RunFolderError, match=rf"score cache {folder}.*scoring.cache"):
            ask(teacher)


def test_no_rollouts_give_no_scores(tiny_models: TinyModels, tmp_path: Path) -> None:
    assert ask(CachedTeacher(FakeTeacher(tiny_models, SAMPLED), SAMPLED, tmp_path), []) == []
