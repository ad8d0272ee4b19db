"""Several teachers behind one port, and means of several."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.errors import ConfigError, DataError, EngineError
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.scoring.by_tag import (
    SamplerByTag,
    TeachersByTag,
    ViewByTag,
    teacher_id_for,
)
from qwen3_distill.scoring.embedded.ensemble import EmbeddedEnsemble
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.ensemble import EnsembleTeacher, mean_logprobs
from qwen3_distill.scoring.views import SameView
from qwen3_distill.types import (
    HiddenRequest,
    ModelIdentity,
    Prompt,
    Rollout,
    RolloutRequest,
    SampledRequest,
    ScoreFailure,
    ScoreRequest,
    ScoreResult,
    ScoringJob,
    TeacherScore,
    TopKRequest,
    TopKScore,
)
from qwen3_distill.utils.concurrency import forever
from tests.contract.builders import synthetic_rollout
from tests.contract.reference import largest_gap, reference_model, response_logprobs
from tests.tiny_models import TinyModels

ROLLOUTS = [synthetic_rollout(5 + seed, 4 + 2 * seed, seed) for seed in range(6)]


def tagged(rollout: Rollout, tag: str | None) -> Rollout:
    data = {} if tag is None else {"teacher": tag}
    prompt = Prompt(
        prompt_id=rollout.prompt.prompt_id, token_ids=rollout.prompt.token_ids, task_data=data
    )
    return replace(rollout, prompt=prompt)


class CountingTeacher:
    """A fault-injecting teacher: it gives a constant, and fails or starts as it is told."""

    def __init__(self, identity: ModelIdentity, name: str, **faults: Any) -> None:
        self.identity, self.teacher_id, self.faults = identity, name, faults
        self.asked: list[str] = []
        self.log: list[str] = faults.get("log", [])

    @property
    def starts_first(self) -> bool:
        return self.faults.get("starts_first", False)

    @property
    def max_dropped_fraction(self) -> float:
        return self.faults.get("max_dropped_fraction", 0.0)

    @property
    def counters(self) -> Mapping[str, float]:
        return {"score/server_restarts": self.faults.get("restarts", 0.0)}

    async def memory_taken(self) -> None:
        await (asyncio.sleep(0) if "starts_until" in self.faults else forever())
        self.log.append(f"{self.teacher_id} has its memory")

    async def start(self) -> None:
        self.log.append(f"{self.teacher_id} starts")
        await asyncio.sleep(0)
        if self.faults.get("no_start"):
            raise EngineError("it does not start")
        if other := self.faults.get("starts_until"):
            for _ in range(100):
                if other in self.log:
                    break
                await asyncio.sleep(0)
        self.log.append(f"{self.teacher_id} started")

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        self.asked += [job.rollout_id for job in jobs]
        name = self.faults.get("answers_as", self.teacher_id)
        failing = self.faults.get("fails", ())
        return [
            ScoreFailure(rollout_id=job.rollout_id, reason="told to")
            if job.rollout_id in failing
            else TeacherScore(teacher_id=name, logprobs=np.full(job.num_scored, -1.0))
            for job in jobs
        ]

    async def close(self) -> None:
        self.log.append(f"{self.teacher_id} closed")


@pytest.fixture(scope="module")
def identity(tiny_models: TinyModels) -> ModelIdentity:
    return load_identity(tiny_models.teacher)


def view() -> ViewByTag:
    return ViewByTag({"a": SameView(), "b": SameView()})


def jobs_of(rollouts: Sequence[Rollout]) -> list[ScoringJob]:
    jobs = [view().job(rollout) for rollout in rollouts]
    return [job for job in jobs if isinstance(job, ScoringJob)]


# --- Routing --------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(tags=st.lists(st.sampled_from(["a", "b"]), min_size=6, max_size=6))
def test_every_job_reaches_its_tags_teacher_in_any_order(
    identity: ModelIdentity, tags: list[str]
) -> None:
    a, b = CountingTeacher(identity, "A"), CountingTeacher(identity, "B")
    rollouts = [tagged(r, tag) for r, tag in zip(ROLLOUTS, tags, strict=True)]
    router = TeachersByTag({"a": a, "b": b})
    results = asyncio.run(router.score(jobs_of(rollouts)))
    for rollout, tag, result in zip(rollouts, tags, results, strict=True):
        scored = view().scored(rollout, result)
        assert not isinstance(scored, ScoreFailure)
        assert scored.score.teacher_id == tag.upper() == teacher_id_for(router, rollout)
    ids = [r.rollout_id for r in rollouts]
    assert a.asked == [i for i, tag in zip(ids, tags, strict=True) if tag == "a"]
    assert b.asked == [i for i, tag in zip(ids, tags, strict=True) if tag == "b"]


def test_a_score_of_another_teacher_is_refused(identity: ModelIdentity) -> None:
    router = TeachersByTag(
        {"a": CountingTeacher(identity, "A", answers_as="B"), "b": CountingTeacher(identity, "B")}
    )
    with pytest.raises(EngineError, match=r"has the tag 'a', whose teacher is A, .*scored by B"):
        asyncio.run(router.score(jobs_of([tagged(ROLLOUTS[0], "a")])))


@pytest.mark.parametrize("tag", [None, "c"])
def test_a_rollout_or_job_without_a_teacher_is_refused(
    identity: ModelIdentity, tag: str | None
) -> None:
    rollout = tagged(ROLLOUTS[0], tag)
    with pytest.raises(DataError, match="expected one of a, b"):
        view().job(rollout)
    router = TeachersByTag(
        {"a": CountingTeacher(identity, "A"), "b": CountingTeacher(identity, "B")}
    )
    with pytest.raises(DataError, match="expected one of a, b"):
        asyncio.run(router.score([replace(SameView().job(rollout), tag=tag)]))
    with pytest.raises(DataError, match="expected one of a, b"):
        teacher_id_for(router, rollout)


def test_failures_keep_their_places(identity: ModelIdentity) -> None:
    failing = [ROLLOUTS[1].rollout_id]
    teachers = {
        "a": CountingTeacher(identity, "A", fails=failing),
        "b": CountingTeacher(identity, "B"),
    }
    jobs = jobs_of([tagged(r, "ab"[i % 2 == 0]) for i, r in enumerate(ROLLOUTS)])
    results = asyncio.run(TeachersByTag(teachers).score(jobs))
    assert [isinstance(r, ScoreFailure) for r in results] == [i == 1 for i in range(6)]


def test_servers_start_one_after_another_and_are_closed_when_one_fails(
    identity: ModelIdentity,
) -> None:
    log: list[str] = []
    servers = {n: CountingTeacher(identity, n, log=log, starts_first=True) for n in "AB"}
    router = TeachersByTag(servers)
    assert router.starts_first
    asyncio.run(router.start())
    assert log == ["A starts", "A started", "B starts", "B started"]
    log.clear()
    servers["A"].faults["starts_until"] = "B starts"
    asyncio.run(router.start())
    assert log == ["A starts", "A has its memory", "B starts", "A started", "B started"]
    log.clear()
    servers["B"].faults["no_start"] = True
    with pytest.raises(EngineError, match="does not start"):
        asyncio.run(router.start())
    assert {"A closed", "B closed"} <= set(log)


def test_counters_are_sums_and_every_teachers_own(identity: ModelIdentity) -> None:
    router = TeachersByTag(
        {
            "a": CountingTeacher(identity, "A", restarts=2.0, max_dropped_fraction=0.5),
            "b": CountingTeacher(identity, "B", restarts=1.0, max_dropped_fraction=0.1),
        }
    )
    assert router.counters == {
        "score/server_restarts": 3.0,
        "by_tag/a_score_server_restarts": 2.0,
        "by_tag/b_score_server_restarts": 1.0,
    }
    assert router.max_dropped_fraction == 0.1


class ListSampler:
    """A fault-injecting sampler: it yields canned rollouts, then fails if it is told to."""

    def __init__(self, rollouts: Sequence[Rollout], error: Exception | None = None) -> None:
        self._by_id = {rollout.rollout_id: rollout for rollout in rollouts}
        self._error = error
        self.asked: list[str] = []

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        for request in requests:
            self.asked.append(request.rollout_id)
            await asyncio.sleep(0)
            yield self._by_id[request.rollout_id]
        if self._error is not None:
            raise self._error


def requests_of(rollouts: Sequence[Rollout]) -> list[RolloutRequest]:
    return [
        RolloutRequest(rollout_id=r.rollout_id, prompt=r.prompt, sampling=r.sampling)
        for r in rollouts
    ]


def test_every_prompt_is_answered_by_its_own_sampler() -> None:
    rollouts = [tagged(r, "ab"[i % 3 == 0]) for i, r in enumerate(ROLLOUTS)]
    samplers = {tag: ListSampler(rollouts) for tag in "ab"}

    async def sample() -> list[str]:
        found = SamplerByTag(samplers).generate(requests_of(rollouts))
        return [rollout.rollout_id async for rollout in found]

    assert sorted(asyncio.run(sample())) == sorted(r.rollout_id for r in rollouts)
    ids = [rollout.rollout_id for rollout in rollouts]
    assert samplers["b"].asked == [i for n, i in enumerate(ids) if n % 3 == 0]
    assert samplers["a"].asked == [i for n, i in enumerate(ids) if n % 3]


def test_an_error_of_one_sampler_ends_the_sampling() -> None:
    rollouts = [tagged(r, "ab"[i % 2]) for i, r in enumerate(ROLLOUTS)]
    samplers = {"a": ListSampler(rollouts), "b": ListSampler(rollouts, EngineError("gone"))}

    async def sample() -> None:
        async for _ in SamplerByTag(samplers).generate(requests_of(rollouts)):
            pass

    with pytest.raises(EngineError, match="gone"):
        asyncio.run(sample())


# --- Means ----------------------------------------------------------------------------------------


def embedded(model: Path, request: ScoreRequest) -> EmbeddedTeacher:
    return EmbeddedTeacher(
        model, request=request, device="cpu", dtype="float32", batch_tokens=64, chunk_tokens=7
    )


def expected_mean(models: Sequence[Path], shares: Sequence[float], rollout: Rollout) -> np.ndarray:
    """[R, V] log of the mean, from whole distributions in float64."""
    with torch.no_grad():
        parts = [response_logprobs(reference_model(m), rollout).double().exp() for m in models]
    weighted = [share * part for share, part in zip(shares, parts, strict=True)]
    return torch.stack(weighted).sum(0).log().numpy()


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.25, 0.75), (0.9, 0.1)])
def test_the_sampled_tokens_logprob_is_that_of_the_mean(
    tiny_models: TinyModels, shares: tuple[float, float]
) -> None:
    models = [tiny_models.teacher, tiny_models.student]
    members = [embedded(model, SampledRequest()) for model in models]
    jobs = [SameView().job(rollout) for rollout in ROLLOUTS]
    for teacher in (
        EnsembleTeacher(members, shares),
        EmbeddedEnsemble(
            members, shares, request=SampledRequest(), batch_tokens=64, chunk_tokens=5
        ),
    ):
        for rollout, score in zip(ROLLOUTS, asyncio.run(teacher.score(jobs)), strict=True):
            assert isinstance(score, TeacherScore)
            assert score.teacher_id == teacher.teacher_id
            mean_RV = expected_mean(models, shares, rollout)
            expected = np.take_along_axis(mean_RV, rollout.response_ids[:, None], axis=1)[:, 0]
            assert largest_gap(score.logprobs, expected) < 1e-4


def test_candidates_are_the_likeliest_of_the_mean(tiny_models: TinyModels) -> None:
    """Some are among neither member's own first ones: no mean of candidates would find them."""
    models, shares, k = [tiny_models.teacher, tiny_models.student], (0.5, 0.5), 8
    request = TopKRequest(k=k)
    members = [embedded(model, request) for model in models]
    ensemble = EmbeddedEnsemble(members, shares, request=request, batch_tokens=64, chunk_tokens=5)
    jobs = [SameView().job(rollout) for rollout in ROLLOUTS]
    found = asyncio.run(ensemble.score(jobs))
    alone = [asyncio.run(member.score(jobs)) for member in members]
    one_sided = 0
    for i, (rollout, score) in enumerate(zip(ROLLOUTS, found, strict=True)):
        assert isinstance(score, TopKScore)
        mean_RV = expected_mean(models, shares, rollout)
        likeliest = -np.sort(-mean_RV, axis=1)[:, :k]
        assert largest_gap(score.candidate_logprobs, likeliest) < 1e-4
        named = np.take_along_axis(mean_RV, score.candidate_ids, axis=1)
        assert largest_gap(score.candidate_logprobs, named) < 1e-4
        for row, ids in enumerate(score.candidate_ids):
            first, other = (set(results[i].candidate_ids[row]) for results in alone)  # type: ignore[union-attr]
            one_sided += len(set(ids) - (first & other))
    assert one_sided > 0


def test_a_mean_has_no_hidden_states(tiny_models: TinyModels) -> None:
    member = embedded(tiny_models.teacher, SampledRequest())
    with pytest.raises(ConfigError, match=r"has none; use objective.kind=top_k"):
        EmbeddedEnsemble([member], [1.0], request=HiddenRequest(), batch_tokens=1, chunk_tokens=1)


def test_a_job_that_one_member_fails_has_no_mean(identity: ModelIdentity) -> None:
    failing = [ROLLOUTS[0].rollout_id]
    members = [CountingTeacher(identity, "A"), CountingTeacher(identity, "B", fails=failing)]
    jobs = [SameView().job(rollout) for rollout in ROLLOUTS[:2]]
    found = asyncio.run(EnsembleTeacher(members, (0.5, 0.5)).score(jobs))
    assert isinstance(found[0], ScoreFailure)
    assert isinstance(found[1], TeacherScore)


def test_a_member_that_answers_as_another_is_refused(identity: ModelIdentity) -> None:
    members = [CountingTeacher(identity, "A"), CountingTeacher(identity, "B", answers_as="A")]
    with pytest.raises(EngineError, match="is B, and its score is of A"):
        asyncio.run(EnsembleTeacher(members, (0.5, 0.5)).score([SameView().job(ROLLOUTS[0])]))


def test_the_id_of_a_mean_has_members_and_shares(identity: ModelIdentity) -> None:
    members = [CountingTeacher(identity, "A"), CountingTeacher(identity, "B")]
    assert EnsembleTeacher(members, (0.25, 0.75)).teacher_id == "mean(0.25*A + 0.75*B)"


def test_a_mean_of_tiny_probabilities_does_not_underflow() -> None:
    logprobs = np.array([[-900.0, 0.0], [-901.0, -2000.0]], dtype=np.float32)
    mean = mean_logprobs(logprobs, (0.5, 0.5))
    assert mean == pytest.approx([-900 + np.log(0.5 * (1 + np.exp(-1))), np.log(0.5)], rel=1e-6)
