"""The teacher in SGLang servers: one that is started here, or some that run elsewhere.

A server is believed only after it gave the answer that its directory must give (`known_answer`),
and every reply only after it was checked token by token (`sglang_wire`).
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from qwen3_distill.config import SglangScoring
from qwen3_distill.errors import (
    ConfigError,
    DataError,
    EngineError,
    EngineLost,
    EngineStartError,
    HandshakeError,
)
from qwen3_distill.modeling.digest import directory_digest
from qwen3_distill.modeling.known_answer import KnownAnswer, known_answer
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.scoring.score_request import (
    HiddenRequest,
    SampledRequest,
    ScoreRequest,
    TopKRequest,
)
from qwen3_distill.scoring.sglang.client import Link, Refused, SglangClient, Unanswered
from qwen3_distill.scoring.sglang.server import MemoryFraction, SglangServer, unless_it_ends
from qwen3_distill.scoring.sglang.wire import (
    Fault,
    FaultKind,
    ReplyError,
    TokenSequence,
    answer_body,
    read_answer,
    read_scores,
    score_body,
)
from qwen3_distill.types import (
    IntArray,
    ModelIdentity,
    Rollout,
    RolloutRequest,
    ScoreFailure,
    ScoreResult,
    TeacherScore,
    WeightVersion,
)

T = TypeVar("T")

BACKOFF_S = 0.5
"""Pause before the first retry; every further one is twice as long."""
BACKOFF_MAX_S = 8.0
ATTEMPTS_TOGETHER = 2
"""After so many attempts a sequence is asked for alone: it may be what spoils the request."""
REMOTE_GRACE_S = 10.0
"""How long a server that runs elsewhere may refuse connections at the start."""
PROBE_PAUSE_S = 0.3
PROBE_TIMEOUT_S = 120.0
"""For one answer: the first one may compile kernels."""
DEATH_GRACE_S = 1.0
"""Between a cut connection and the end of the process that cut it."""
ANSWERS_IN_FLIGHT = 256
ANSWER_S_PER_TOKEN = 0.1

DROPPED = "score/dropped_rollouts"
RESTARTS = "score/server_restarts"


class SglangTeacher:
    """A `TeacherScorer` over HTTP.

    Args:
        memory_fraction: of a server started here; see `MemoryFraction`.
        max_total_tokens: of a server started here; None: SGLang's default.
        log: file that takes the output of a server started here.

    Raises:
        ConfigError: the request is for something that a server does not give.
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
        self._identity = load_identity(config.model)
        _check_request(request, self._identity)
        self._request = request
        self._log = log
        self._server: SglangServer | None = None
        if not config.urls:
            self._server = SglangServer(
                config,
                context_length=self._identity.context_length,
                memory_fraction=memory_fraction,
                max_total_tokens=max_total_tokens,
                log=log,
            )
        self._scores: SglangClient | None = None
        self._answers: SglangClient | None = None
        self._expected: asyncio.Task[KnownAnswer] | None = None
        self._digest: str | None = None
        self._counters: Counter[str] = Counter()
        self._num_answered = 0
        self._incarnation = 0
        self._num_restarts = 0
        self._restart_lock = asyncio.Lock()

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @property
    def teacher_id(self) -> str:
        """The directory's digest and the precision it is served in."""
        config = self._config
        precision = config.quantization or config.dtype
        head = "+float32-head" if config.float32_head else ""
        return f"{Path(config.model).name}#{self._weights_digest}@sglang-{precision}{head}"

    @property
    def counters(self) -> Mapping[str, float]:
        """Retries by reason, rollouts given up and restarts since the start, by metric key."""
        return dict(self._counters)

    @property
    def server(self) -> SglangServer | None:
        """The server that is started here; None where others run elsewhere."""
        return self._server

    async def start(self) -> None:
        """Start the server, or find the ones elsewhere, and check what they answer.

        Raises:
            EngineStartError: no server came up.
            HandshakeError: a server answers, but not as the directory's model must.
        """
        await self.close()
        self._counters.clear()
        self._num_restarts = 0
        # In a thread, so that the files are read while the server loads them too.
        self._expected = expected = asyncio.create_task(asyncio.to_thread(self._look_up))
        try:
            if self._server is None:
                self._connect(self._config.urls, self._remote_key())
                await _all_or_none(self._find(link) for link in self._score_client.links)
            else:
                await self._launch(self._server)
        except BaseException:
            expected.cancel()
            await asyncio.gather(expected, return_exceptions=True)
            await self.close()
            raise

    async def score(self, rollouts: Sequence[Rollout]) -> list[ScoreResult]:
        """See `TeacherScorer.score`.

        Raises:
            DataError: a sequence is longer than the teacher's context, or not of its vocabulary.
            EngineError: no server answers any more.
            EngineLost: the server died more often than it may.
        """
        self._check_fits(rollouts)
        results: dict[int, ScoreResult] = {}
        await _all_or_none(
            self._score_group(group, rollouts, results)
            for group in request_groups(rollouts, self._config.request_tokens)
        )
        return [results[index] for index in range(len(rollouts))]

    def sampler(self) -> "SglangSampler":
        """The teacher as it scores, answering prompts: for its accuracy."""
        return SglangSampler(self)

    async def close(self) -> None:
        for client in (self._scores, self._answers):
            if client is not None:
                await client.close()
        self._scores = self._answers = None
        if self._server is not None:
            await self._server.close()

    # --- Starting -------------------------------------------------------------------------------

    @property
    def _score_client(self) -> SglangClient:
        if self._scores is None:
            raise EngineError("the teacher is not started: start it before the first score")
        return self._scores

    def _look_up(self) -> KnownAnswer:
        self._digest = directory_digest(self._config.model)[:16]
        return known_answer(self._config.model)

    @property
    def _weights_digest(self) -> str:
        if self._digest is None:
            self._digest = directory_digest(self._config.model)[:16]
        return self._digest

    def _connect(self, urls: Sequence[str], api_key: str | None) -> None:
        config = self._config
        self._scores = SglangClient(
            urls,
            api_key=api_key,
            max_in_flight=config.max_in_flight,
            timeout_s=config.request_timeout_s,
        )
        self._answers = SglangClient(
            urls,
            api_key=api_key,
            max_in_flight=ANSWERS_IN_FLIGHT,
            timeout_s=config.request_timeout_s,
        )

    def _remote_key(self) -> str | None:
        file = self._config.api_key_file
        if file is None:
            return None
        try:
            return Path(file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"scoring.api_key_file {file} cannot be read: {error}") from error

    async def _launch(self, server: SglangServer) -> None:
        """Start the server and wait for its first checked answer, or its end."""
        if server.on_cpu and self._config.quantization is not None:
            raise ConfigError(
                f"scoring.quantization={self._config.quantization} needs a GPU, and there is "
                "none; set scoring.quantization=null"
            )
        for client in (self._scores, self._answers):
            if client is not None:
                await client.close()
        await server.start()
        self._connect([server.url], server.api_key)
        await unless_it_ends(server, self._find(self._score_client.links[0]))

    async def _find(self, link: Link) -> None:
        await self._first_answer(link)
        await self._check_known_answer(link)

    async def _first_answer(self, link: Link) -> None:
        """Wait until a server answers at all."""
        clock = asyncio.get_running_loop()
        began = clock.time()
        body = score_body([TokenSequence(np.zeros(2, dtype=np.int32), 1)], SampledRequest())
        while True:
            try:
                await self._score_client.post(body, tokens=2, timeout_s=PROBE_TIMEOUT_S, link=link)
            except Unanswered as error:
                waited = clock.time() - began
                self._check_patience(waited, error.fault)
                await asyncio.sleep(PROBE_PAUSE_S)
            except Refused as error:
                raise EngineStartError(
                    f"{error}: this is no SGLang server, or one without /generate"
                ) from error
            else:
                return

    def _check_patience(self, waited_s: float, fault: Fault) -> None:
        limit = self._config.start_timeout_s
        unreachable = self._server is None and fault.kind is FaultKind.CONNECTION
        if unreachable and waited_s > min(REMOTE_GRACE_S, limit):
            raise EngineStartError(
                f"no server answers ({fault.detail}); check scoring.urls, and that the server "
                "listens on an address that can be reached from here"
            )
        if waited_s > limit:
            own = "" if self._server is None else self._server.last_output()
            raise EngineStartError(
                f"the SGLang server gave no answer within scoring.start_timeout_s={limit:g} "
                f"({fault.detail}){own}"
            )

    async def _check_known_answer(self, link: Link) -> None:
        """Raise unless a server scores as the directory's model must."""
        assert self._expected is not None, "looked up since the start"
        expected = await self._expected
        sequence = TokenSequence(expected.token_ids, 1)
        score: TeacherScore | Fault = Fault(FaultKind.CONNECTION, "not asked")
        for attempt in range(self._config.max_attempts):
            if attempt:
                await asyncio.sleep(_backoff_s(attempt))
            score = await self._probe(link, sequence)
            if isinstance(score, TeacherScore):
                self._compare(link, score, expected)
                return
            self._counters[f"score/retried_{score.kind.value}"] += 1
        raise EngineStartError(
            f"{link.url} gives no score to a known sequence: {score.kind.value}: {score.detail}"
        )

    async def _probe(self, link: Link, sequence: TokenSequence) -> TeacherScore | Fault:
        body = score_body([sequence], SampledRequest())
        tokens = int(sequence.ids.size)
        try:
            reply = await self._score_client.post(
                body, tokens=tokens, timeout_s=PROBE_TIMEOUT_S, link=link
            )
            (score,) = self._read(reply, [sequence], SampledRequest())
        except (Unanswered, ReplyError) as error:
            return error.fault
        except Refused as error:
            return Fault(FaultKind.REFUSED, str(error))
        return score

    def _compare(self, link: Link, score: TeacherScore, expected: KnownAnswer) -> None:
        tolerance = self._config.readiness_tolerance_nats
        gap = float(np.abs(score.logprobs - expected.logprobs).mean())
        if gap <= tolerance:
            return
        shifts = [
            float(np.abs(np.roll(score.logprobs, shift) - expected.logprobs)[1:-1].mean())
            for shift in (-1, 1)
        ]
        hint = (
            "the scores fit when shifted by one token"
            if min(shifts) <= tolerance
            else "it serves another model, or in another precision"
        )
        raise HandshakeError(
            f"{link.url} does not score as {self._config.model} must: on "
            f"{expected.logprobs.size} known tokens they are {gap:.3f} nats apart on average, more "
            f"than scoring.readiness_tolerance_nats={tolerance:g}. First tokens: server "
            f"{np.round(score.logprobs[:4], 2).tolist()}, directory "
            f"{np.round(expected.logprobs[:4], 2).tolist()}; {hint}"
        )

    # --- Scoring --------------------------------------------------------------------------------

    def _check_fits(self, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            length = rollout.prompt.token_ids.size + rollout.response_ids.size
            if length > self._identity.context_length:
                raise DataError(
                    f"rollout {rollout.rollout_id} has {length} tokens, more than the teacher's "
                    f"context of {self._identity.context_length}; lower sampling.max_new_tokens"
                )
            self.check_vocabulary(rollout.rollout_id, rollout.prompt.token_ids)
            self.check_vocabulary(rollout.rollout_id, rollout.response_ids)

    def check_vocabulary(self, rollout_id: str, ids: IntArray) -> None:
        """Raise for an id that the teacher does not have: a server would die of it."""
        size = self._identity.vocab_size
        if int(ids.min()) < 0 or int(ids.max()) >= size:
            raise DataError(
                f"rollout {rollout_id} has token {int(ids.max())} (smallest {int(ids.min())}), and "
                f"the teacher's vocabulary is 0 to {size - 1}; use a teacher with the student's "
                "vocabulary"
            )

    async def _score_group(
        self, group: list[int], rollouts: Sequence[Rollout], results: dict[int, ScoreResult]
    ) -> None:
        """Score some rollouts; what cannot be had is a `ScoreFailure`."""
        answered_before = self._num_answered
        faults: dict[int, Fault] = {}
        pending = [group]
        for attempt in range(1, self._config.max_attempts + 1):
            found = await _all_or_none(
                self._score_once(part, rollouts, results) for part in pending
            )
            faults = {index: fault for part in found for index, fault in part.items()}
            if not faults or attempt == self._config.max_attempts:
                break
            self._counters.update(f"score/retried_{f.kind.value}" for f in faults.values())
            bad = sorted(faults)
            pending = [bad] if attempt < ATTEMPTS_TOGETHER else [[index] for index in bad]
            await asyncio.sleep(_backoff_s(attempt))
        if faults and self._num_answered == answered_before:
            fault = next(iter(faults.values()))
            raise EngineError(
                f"the teacher gave no answer in {self._config.max_attempts} attempts "
                f"(scoring.max_attempts): {fault.detail}"
            )
        for index, fault in faults.items():
            self._give_up(index, fault, rollouts, results)

    async def _score_once(
        self, group: list[int], rollouts: Sequence[Rollout], results: dict[int, ScoreResult]
    ) -> dict[int, Fault]:
        """Ask once; scores go to ``results``, and what may be asked again is returned."""
        sequences = [TokenSequence.of(rollouts[index]) for index in group]
        tokens = sum(int(sequence.ids.size) for sequence in sequences)
        try:
            reply = await self.ask_for_scores(score_body(sequences, self._request), tokens=tokens)
            outcomes = self._read(reply, sequences, self._request)
        except (Unanswered, ReplyError) as error:
            return dict.fromkeys(group, error.fault)
        except Refused as error:
            return await self._isolate(group, str(error), rollouts, results)
        faults: dict[int, Fault] = {}
        for index, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, Fault):
                faults[index] = outcome
            else:
                results[index] = outcome
        return faults

    async def _isolate(
        self,
        group: list[int],
        reason: str,
        rollouts: Sequence[Rollout],
        results: dict[int, ScoreResult],
    ) -> dict[int, Fault]:
        """One refused sequence has its whole request refused: find it."""
        if len(group) == 1:
            self._give_up(group[0], Fault(FaultKind.REFUSED, reason), rollouts, results)
            return {}
        found = await _all_or_none(self._score_once([index], rollouts, results) for index in group)
        return {index: fault for part in found for index, fault in part.items()}

    def _give_up(
        self,
        index: int,
        fault: Fault,
        rollouts: Sequence[Rollout],
        results: dict[int, ScoreResult],
    ) -> None:
        self._counters[DROPPED] += 1
        results[index] = ScoreFailure(
            rollout_id=rollouts[index].rollout_id, reason=f"{fault.kind.value}: {fault.detail}"
        )

    def _read(
        self, reply: bytes, sequences: Sequence[TokenSequence], request: ScoreRequest
    ) -> list[TeacherScore | Fault]:
        return read_scores(
            reply,
            sequences,
            request,
            vocab_size=self._identity.vocab_size,
            teacher_id=self.teacher_id,
        )

    # --- Answers, and a server that died --------------------------------------------------------

    async def ask_for_scores(self, body: bytes, *, tokens: int) -> bytes:
        """A reply to a scoring request; see `SglangClient.post`."""
        reply = await self._ask(False, body, tokens, None)
        self._num_answered += 1
        return reply

    async def ask_for_answer(self, body: bytes, *, tokens: int, max_new_tokens: int) -> bytes:
        """A reply to a request that samples; see `SglangClient.post`."""
        patience_s = self._config.request_timeout_s + ANSWER_S_PER_TOKEN * max_new_tokens
        return await self._ask(True, body, tokens, patience_s)

    async def _ask(self, samples: bool, body: bytes, tokens: int, timeout_s: float | None) -> bytes:
        """A server that died meanwhile is started again, and asked again."""
        while True:
            incarnation = self._incarnation
            client = self._answers if samples else self._score_client
            assert client is not None, "the clients come and go together"
            try:
                return await client.post(body, tokens=tokens, timeout_s=timeout_s)
            except Unanswered as error:
                if error.fault.kind is FaultKind.TIMEOUT or not await self._revived(incarnation):
                    raise
            except Refused:
                self._num_answered += 1
                raise

    async def _revived(self, incarnation: int) -> bool:
        """Whether the server had died since then, and serves again."""
        server = self._server
        if server is None or self._scores is None:  # not ours, or closed meanwhile
            return False
        async with self._restart_lock:
            if self._incarnation != incarnation:
                return True
            if server.is_running and not await server.ends_within(DEATH_GRACE_S):
                return False
            if self._num_restarts == self._config.max_restarts:
                raise EngineLost(
                    f"the SGLang server died, after {self._num_restarts} restarts "
                    f"(scoring.max_restarts){server.last_output()}"
                )
            self._num_restarts += 1
            self._counters[RESTARTS] += 1
            await self._launch(server)
            self._incarnation += 1
            return True

    def note_retry(self, fault: Fault) -> None:
        """Count an answer that is asked for again."""
        self._counters[f"evaluate/retried_{fault.kind.value}"] += 1

    @property
    def max_attempts(self) -> int:
        return self._config.max_attempts

    @property
    def version(self) -> WeightVersion:
        """The teacher's weights as a version that never changes."""
        return WeightVersion(step=0, digest=self._weights_digest)


class SglangSampler:
    """A `Sampler`: the server that scores also answers prompts.

    Its random numbers are its own: the same request gives another answer the next time, unless the
    server runs with ``enable-deterministic-inference``.
    """

    def __init__(self, teacher: SglangTeacher) -> None:
        self._teacher = teacher

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout, None]:
        """See `Sampler.generate`.

        Raises:
            EngineError: a request got no answer after all attempts.
        """
        for request in requests:
            self._teacher.check_vocabulary(request.rollout_id, request.prompt.token_ids)
        tasks = [asyncio.create_task(self._answer(request)) for request in requests]
        try:
            for finished in asyncio.as_completed(tasks):
                yield await finished
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, request: RolloutRequest) -> Rollout:
        teacher = self._teacher
        eos_ids, vocab_size = teacher.identity.eos_ids, teacher.identity.vocab_size
        body = answer_body(request, eos_ids, vocab_size)
        budget = request.sampling.max_new_tokens
        fault = Fault(FaultKind.CONNECTION, "not asked")
        for attempt in range(1, teacher.max_attempts + 1):
            try:
                reply = await teacher.ask_for_answer(
                    body,
                    tokens=int(request.prompt.token_ids.size) + budget,
                    max_new_tokens=budget,
                )
                return read_answer(reply, request, eos_ids, teacher.version)
            except (Unanswered, ReplyError) as error:
                fault = error.fault
            except Refused as error:
                raise EngineError(f"{request.rollout_id}: {error}") from error
            if attempt < teacher.max_attempts:
                teacher.note_retry(fault)
                await asyncio.sleep(_backoff_s(attempt))
        raise EngineError(
            f"{request.rollout_id}: the teacher gave no answer in {teacher.max_attempts} "
            f"attempts: {fault.detail}"
        )


def request_groups(rollouts: Sequence[Rollout], request_tokens: int) -> list[list[int]]:
    """Indices of the rollouts of each request: those of one prompt adjacent, by token budget.

    A server computes a prompt once for the sequences that follow one another with it.
    """
    first_of_prompt: dict[bytes, int] = {}
    for index, rollout in enumerate(rollouts):
        first_of_prompt.setdefault(rollout.prompt.token_ids.tobytes(), index)
    order = sorted(
        range(len(rollouts)),
        key=lambda index: (first_of_prompt[rollouts[index].prompt.token_ids.tobytes()], index),
    )
    groups: list[list[int]] = []
    used = 0
    for index in order:
        size = int(rollouts[index].prompt.token_ids.size + rollouts[index].response_ids.size)
        if groups and used + size <= request_tokens:
            groups[-1].append(index)
            used += size
        else:
            groups.append([index])
            used = size
    return groups


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


def _backoff_s(attempt: int) -> float:
    return min(BACKOFF_S * 2 ** (attempt - 1), BACKOFF_MAX_S)


async def _all_or_none(work: Iterable[Awaitable[T]]) -> list[T]:
    """All results; when one fails, the others are cancelled before the error goes on."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
