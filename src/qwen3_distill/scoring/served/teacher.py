"""The teacher in servers that are asked over HTTP: one that is started here, or several elsewhere.

A server is used only after it scored a known sequence as its directory's weights do (`readiness`),
and a reply only after it was checked token by token (`wire`).
"""

import asyncio
import copy
from collections.abc import Mapping, Sequence

from typing_extensions import Self

from qwen3_distill.config import ServedScoring
from qwen3_distill.errors import ConfigError, EngineError
from qwen3_distill.modeling.digest import directory_digest
from qwen3_distill.modeling.hub import model_label
from qwen3_distill.modeling.known_answer import KnownAnswer, known_answer
from qwen3_distill.ports import CACHED_TOKENS
from qwen3_distill.scoring.handshake import check_lengths
from qwen3_distill.scoring.served.client import backoff_s
from qwen3_distill.scoring.served.endpoint import ServedEndpoint
from qwen3_distill.scoring.served.faults import Fault, FaultKind, Refused, ReplyError, Unanswered
from qwen3_distill.scoring.served.groups import first_of_contexts, request_groups
from qwen3_distill.scoring.served.sampler import ServedSampler
from qwen3_distill.scoring.served.server import EngineServer
from qwen3_distill.scoring.served.wire import Wire
from qwen3_distill.types import (
    GivenCandidatesRequest,
    HiddenRequest,
    ModelIdentity,
    ScoreFailure,
    ScoreRequest,
    ScoreResult,
    ScoringJob,
    TopKRequest,
    WeightVersion,
)
from qwen3_distill.utils.concurrency import together

ATTEMPTS_TOGETHER = 2
"""Attempts before each job is asked for alone: one bad job can spoil its whole request."""

DROPPED = "score/dropped_rollouts"


class ServedTeacher:
    """A `TeacherScorer` over HTTP.

    Args:
        wire: the interface of the servers.
        identity: the teacher's, read from the directory.
        request: what the objective needs.
        server: the server to start; None: the config's `urls` are used.
        probe: what a server is asked for first, at its start; it must be able to answer it.

    Raises:
        ConfigError: no server can answer the request.
    """

    def __init__(
        self,
        config: ServedScoring,
        wire: Wire,
        *,
        identity: ModelIdentity,
        request: ScoreRequest,
        server: EngineServer | None,
        probe: ScoreRequest,
    ) -> None:
        _check_request(request, identity, wire)
        self._config = config
        self._wire = wire
        self._identity = identity
        self._request = request
        self._temperature = 1.0
        self._digest: str | None = None
        self._endpoint = ServedEndpoint(config, wire, identity, server, probe=probe)

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @property
    def teacher_id(self) -> str:
        """Name, digest of the model directory, and the precision it is served in."""
        config = self._config
        precision = config.quantization or config.dtype
        head = "+float32-head" if config.float32_head else ""
        weights = f"{model_label(config.model)}#{self._weights_digest}"
        return f"{weights}@{self._wire.kind}-{precision}{head}"

    @property
    def counters(self) -> Mapping[str, float]:
        """Retries by reason, rollouts given up and restarts since the start, by metric key."""
        return self._endpoint.counters

    @property
    def max_dropped_fraction(self) -> float:
        return self._config.max_dropped_fraction

    @property
    def starts_first(self) -> bool:
        return self._wire.starts_first

    async def memory_taken(self) -> None:
        if self.server is not None:  # servers elsewhere share no device with the engines here
            await self.server.memory_taken()

    @property
    def wire(self) -> Wire:
        """The interface of its servers."""
        return self._wire

    @property
    def server(self) -> EngineServer | None:
        """The server that is started here; None if the servers run elsewhere."""
        return self._endpoint.server

    async def start(self) -> None:
        """Start the server, or connect to the ones elsewhere, and check their answers.

        Raises:
            EngineStartError: no server came up.
            HandshakeError: a server gives other scores than the directory's model.
        """
        await self.close()
        # In a thread: the files are read while the server loads them too.
        expected = asyncio.create_task(asyncio.to_thread(self._compute_known_answer))
        try:
            await self._endpoint.start(expected)
        except BaseException:
            expected.cancel()
            await asyncio.gather(expected, return_exceptions=True)
            await self.close()
            raise

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        """See `TeacherScorer.score`.

        Raises:
            DataError: a job is longer than the teacher's context, or not of its vocabulary.
            EngineError: no server answers any more.
            EngineLost: the server died more often than `max_restarts` allows.
        """
        check_lengths(jobs, self._identity)
        for job in jobs:
            self._endpoint.check_vocabulary(job.rollout_id, job.token_ids)
        results: dict[int, ScoreResult] = {}
        # A context is still in the cache when the rest of its group is asked about.
        turns = asyncio.Semaphore(self._config.max_in_flight * max(1, len(self._config.urls)))

        async def score_group(group: list[int]) -> None:
            first, rest = group, list[int]()
            if self._wire.reads_cache:
                first, rest = first_of_contexts(group, jobs)
            if not rest:
                await self._score_group(first, jobs, results)
                return
            async with turns:
                await self._score_group(first, jobs, results)
                await self._score_group(rest, jobs, results)

        groups = request_groups(jobs, self._config.request_tokens, max_jobs=self._wire.max_jobs)
        await together(*map(score_group, groups))
        return [results[index] for index in range(len(jobs))]

    def asked_at(self, temperature: float) -> Self:
        """Return this teacher with another sampling temperature in its requests.

        It shares the servers: start and close the original. A server that applies the temperature
        to the logprobs of given tokens gives other scores.
        """
        other = copy.copy(self)
        other._temperature = temperature
        return other

    def sampler(self) -> ServedSampler:
        """Return a `Sampler` of the same servers, for the teacher's accuracy."""
        version = WeightVersion(step=0, digest=self._weights_digest)
        return ServedSampler(self._endpoint, self._identity, version)

    async def close(self) -> None:
        await self._endpoint.close()

    def _compute_known_answer(self) -> KnownAnswer:
        self._digest = directory_digest(self._config.model)[:16]
        return known_answer(self._config.model)

    @property
    def _weights_digest(self) -> str:
        if self._digest is None:
            self._digest = directory_digest(self._config.model)[:16]
        return self._digest

    async def _score_group(
        self, group: list[int], jobs: Sequence[ScoringJob], results: dict[int, ScoreResult]
    ) -> None:
        """Score some jobs; one without a score after all attempts becomes a `ScoreFailure`."""
        answered_before = self._endpoint.num_answered
        faults: dict[int, Fault] = {}
        pending = [group]
        for attempt in range(1, self._config.max_attempts + 1):
            found = await together(*(self._score_once(part, jobs, results) for part in pending))
            faults = {index: fault for part in found for index, fault in part.items()}
            if not faults or attempt == self._config.max_attempts:
                break
            for fault in faults.values():
                self._endpoint.count(f"score/retried_{fault.kind.value}")
            bad = sorted(faults)
            pending = [bad] if attempt < ATTEMPTS_TOGETHER else [[index] for index in bad]
            await asyncio.sleep(backoff_s(attempt))
        if faults and self._endpoint.num_answered == answered_before:
            fault = next(iter(faults.values()))
            raise EngineError(
                f"the teacher gave no answer in {self._config.max_attempts} attempts "
                f"(scoring.max_attempts): {fault.detail}"
            )
        for index, fault in faults.items():
            self._give_up(index, fault, jobs, results)

    async def _score_once(
        self, group: list[int], jobs: Sequence[ScoringJob], results: dict[int, ScoreResult]
    ) -> dict[int, Fault]:
        """Ask once. Put scores into ``results``; return the faults of jobs to ask for again."""
        asked = [jobs[index] for index in group]
        tokens = sum(int(job.token_ids.size) for job in asked)
        try:
            reply = await self._endpoint.ask_for_scores(
                self._wire.score_body(asked, self._request, temperature=self._temperature),
                tokens=tokens,
                max_bytes=self._wire.score_reply_limit(asked, self._request),
            )
            outcomes = self._wire.read_scores(
                reply,
                asked,
                self._request,
                vocab_size=self._identity.vocab_size,
                teacher_id=self.teacher_id,
                on_cached=self._count_cached,
            )
        except (Unanswered, ReplyError) as error:
            return dict.fromkeys(group, error.fault)
        except Refused as error:
            return await self._isolate(group, str(error), jobs, results)
        faults: dict[int, Fault] = {}
        for index, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, Fault):
                faults[index] = outcome
            else:
                results[index] = outcome
        return faults

    def _count_cached(self, tokens: int) -> None:
        if tokens:
            self._endpoint.count(CACHED_TOKENS, tokens)

    async def _isolate(
        self,
        group: list[int],
        reason: str,
        jobs: Sequence[ScoringJob],
        results: dict[int, ScoreResult],
    ) -> dict[int, Fault]:
        """Ask for each job alone: the server refuses a whole request for one bad sequence."""
        if len(group) == 1:
            self._give_up(group[0], Fault(FaultKind.REFUSED, reason), jobs, results)
            return {}
        found = await together(*(self._score_once([index], jobs, results) for index in group))
        return {index: fault for part in found for index, fault in part.items()}

    def _give_up(
        self,
        index: int,
        fault: Fault,
        jobs: Sequence[ScoringJob],
        results: dict[int, ScoreResult],
    ) -> None:
        self._endpoint.count(DROPPED)
        results[index] = ScoreFailure(
            rollout_id=jobs[index].rollout_id, reason=f"{fault.kind.value}: {fault.detail}"
        )


def _check_request(request: ScoreRequest, identity: ModelIdentity, wire: Wire) -> None:
    if isinstance(request, HiddenRequest):
        raise ConfigError(
            "the objective asks for the teacher's hidden states, which are not taken from "
            f"{wire.engine}'s servers; use scoring.kind=embedded, or objective.kind=top_k"
        )
    if isinstance(request, GivenCandidatesRequest):
        raise ConfigError(
            f"the objective asks for the teacher's logprobs of given tokens at every position, "
            f"which {wire.engine}'s servers do not give; use scoring.kind=embedded, or "
            "objective.support=teacher"
        )
    if isinstance(request, TopKRequest) and request.k > identity.vocab_size:
        raise ConfigError(
            f"the objective asks for the top {request.k} tokens, and the teacher's vocabulary "
            f"has {identity.vocab_size}; lower k"
        )
