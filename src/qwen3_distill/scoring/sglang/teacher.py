"""The teacher in SGLang servers: one that is started here, or several that run elsewhere.

A server is used only after it scored a known sequence as its directory's weights do (`readiness`),
and a reply only after it was checked token by token (`wire`).
"""

import asyncio
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen3_distill.config import SglangScoring
from qwen3_distill.errors import ConfigError, EngineError
from qwen3_distill.modeling.digest import directory_digest
from qwen3_distill.modeling.hub import model_label
from qwen3_distill.modeling.known_answer import KnownAnswer, known_answer
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.ports import CACHED_TOKENS
from qwen3_distill.scoring.handshake import check_lengths
from qwen3_distill.scoring.sglang.client import backoff_s
from qwen3_distill.scoring.sglang.endpoint import SglangEndpoint
from qwen3_distill.scoring.sglang.faults import Fault, FaultKind, Refused, ReplyError, Unanswered
from qwen3_distill.scoring.sglang.groups import request_groups
from qwen3_distill.scoring.sglang.key import read_api_key
from qwen3_distill.scoring.sglang.sampler import SglangSampler
from qwen3_distill.scoring.sglang.server import MemoryFraction, SglangServer
from qwen3_distill.scoring.sglang.wire import read_scores, score_body, score_reply_limit
from qwen3_distill.types import (
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


class SglangTeacher:
    """A `TeacherScorer` over HTTP.

    Args:
        request: what the objective needs.
        memory_fraction: of a server started here; see `MemoryFraction`.
        max_total_tokens: of a server started here; None: SGLang's default.
        log: file that takes the output of a server started here.

    Raises:
        ConfigError: no server can answer the request, or the key cannot be read.
    """

    def __init__(
        self,
        config: SglangScoring,
        *,
        request: ScoreRequest,
        memory_fraction: MemoryFraction,
        max_total_tokens: int | None,
        log: Path,
    ) -> None:
        self._config = config
        if config.api_key_file is not None:
            read_api_key(config.api_key_file)  # a bad one is said before anything is loaded
        self._identity = load_identity(config.model)
        _check_request(request, self._identity)
        self._request = request
        self._temperature = 1.0
        self._digest: str | None = None
        server: SglangServer | None = None
        if not config.urls:
            server = SglangServer(
                config,
                context_length=self._identity.context_length,
                memory_fraction=memory_fraction,
                max_total_tokens=max_total_tokens,
                log=log,
            )
        self._endpoint = SglangEndpoint(config, self._identity, server)

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @property
    def teacher_id(self) -> str:
        """Name, digest of the model directory, and the precision it is served in."""
        config = self._config
        precision = config.quantization or config.dtype
        head = "+float32-head" if config.float32_head else ""
        return f"{model_label(config.model)}#{self._weights_digest}@sglang-{precision}{head}"

    @property
    def counters(self) -> Mapping[str, float]:
        """Retries by reason, rollouts given up and restarts since the start, by metric key."""
        return self._endpoint.counters

    @property
    def max_dropped_fraction(self) -> float:
        return self._config.max_dropped_fraction

    @property
    def starts_first(self) -> bool:
        return True

    @property
    def server(self) -> SglangServer | None:
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
        await together(
            *(
                self._score_group(group, jobs, results)
                for group in request_groups(jobs, self._config.request_tokens)
            )
        )
        return [results[index] for index in range(len(jobs))]

    def asked_at(self, temperature: float) -> "SglangTeacher":
        """Return this teacher with another sampling temperature in its requests.

        It shares the servers: start and close the original. A server that applies the temperature
        to the logprobs of given tokens gives other scores.
        """
        other = copy.copy(self)
        other._temperature = temperature
        return other

    def sampler(self) -> SglangSampler:
        """Return a `Sampler` of the same servers, for the teacher's accuracy."""
        version = WeightVersion(step=0, digest=self._weights_digest)
        return SglangSampler(self._endpoint, self._identity, version)

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
                score_body(asked, self._request, temperature=self._temperature),
                tokens=tokens,
                max_bytes=score_reply_limit(asked, self._request),
            )
            outcomes = read_scores(
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


def _check_request(request: ScoreRequest, identity: ModelIdentity) -> None:
    if isinstance(request, HiddenRequest):
        raise ConfigError(
            "the objective asks for the teacher's hidden states, which an SGLang server does not "
            "give; use scoring.kind=embedded, or objective.kind=top_k"
        )
    if isinstance(request, TopKRequest) and request.k > identity.vocab_size:
        raise ConfigError(
            f"the objective asks for the top {request.k} tokens, and the teacher's vocabulary "
            f"has {identity.vocab_size}; lower k"
        )
