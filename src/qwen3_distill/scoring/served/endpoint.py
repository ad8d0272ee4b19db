"""The servers behind a teacher: one that is started here, or several that run elsewhere."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence

from qwen3_distill.config import ServedScoring
from qwen3_distill.errors import ConfigError, DataError, EngineError, EngineLost
from qwen3_distill.hosts.supervision import Restarts
from qwen3_distill.modeling.known_answer import KnownAnswer
from qwen3_distill.scoring.served.client import ServerClient, ServerConnection
from qwen3_distill.scoring.served.faults import FaultKind, Refused, Unanswered
from qwen3_distill.scoring.served.key import read_api_key
from qwen3_distill.scoring.served.readiness import (
    check_known_answer,
    check_sampling,
    wait_for_answer,
)
from qwen3_distill.scoring.served.server import EngineServer, unless_it_ends
from qwen3_distill.scoring.served.wire import Wire
from qwen3_distill.types import IntArray, ModelIdentity, ScoreRequest
from qwen3_distill.utils.concurrency import together

DEATH_GRACE_S = 1.0
"""Wait between a cut connection and the end of the process that cut it."""
ANSWERS_IN_FLIGHT = 256
ANSWER_S_PER_TOKEN = 0.1

RESTARTS = "score/server_restarts"


class ServedEndpoint:
    """Sends requests to checked servers; starts a server of its own, again if it dies.

    Args:
        wire: the interface of the servers.
        identity: of the model that the servers must serve.
        probe: what a server is asked for first; it must be able to answer it.
        server: the server to start; None: the config's `urls` are used.
    """

    def __init__(
        self,
        config: ServedScoring,
        wire: Wire,
        identity: ModelIdentity,
        server: EngineServer | None,
        *,
        probe: ScoreRequest,
    ) -> None:
        self.config = config
        self.wire = wire
        self.server = server
        self.num_answered = 0
        """Scoring requests answered, and requests of both kinds refused."""
        self._identity = identity
        self._probe = probe
        self._scores: ServerClient | None = None
        self._answers: ServerClient | None = None
        self._expected: asyncio.Task[KnownAnswer] | None = None
        self._counters: Counter[str] = Counter()
        self._sampling_checked: int | None = None
        self._restarts = self._new_restarts()

    @property
    def counters(self) -> Mapping[str, float]:
        """Events since the start, by metric key."""
        count = self._restarts.count
        return {**self._counters, **({RESTARTS: count} if count else {})}

    def count(self, key: str, amount: int = 1) -> None:
        """Add to a counter."""
        self._counters[key] += amount

    async def start(self, expected: "asyncio.Task[KnownAnswer]") -> None:
        """Start the server, or connect to the ones elsewhere, and check their answers.

        Args:
            expected: gives the logprobs that follow from the model directory.

        Raises:
            EngineStartError: no server came up.
            HandshakeError: a server gives other scores than the directory's model.
        """
        self._counters.clear()
        self._expected = expected
        self._sampling_checked = None
        self._restarts = self._new_restarts()
        await self._restarts.start()

    async def close(self) -> None:
        """End the connections and the server. May be called more than once."""
        await self._restarts.close()
        self._scores = self._answers = None

    def check_vocabulary(self, rollout_id: str, ids: IntArray) -> None:
        """Raise for an id outside the teacher's vocabulary: it would crash a server."""
        size = self._identity.vocab_size
        if int(ids.min()) < 0 or int(ids.max()) >= size:
            raise DataError(
                f"rollout {rollout_id} has token {int(ids.max())} (smallest {int(ids.min())}), and "
                f"the teacher's vocabulary is 0 to {size - 1}; use a teacher with the student's "
                "vocabulary"
            )

    async def ask_for_scores(self, body: bytes, *, tokens: int, max_bytes: int) -> bytes:
        """Return the reply to a scoring request; see `ServerClient.post`."""
        reply = await self._ask(False, body, tokens, max_bytes, None)
        self.num_answered += 1
        return reply

    async def ask_for_answer(
        self, body: bytes, *, tokens: int, max_bytes: int, max_new_tokens: int
    ) -> bytes:
        """Return the reply to a sampling request; see `ServerClient.post`."""
        patience_s = self.config.request_timeout_s + ANSWER_S_PER_TOKEN * max_new_tokens
        return await self._ask(True, body, tokens, max_bytes, patience_s)

    async def check_sampling(self, eos_ids: frozenset[int]) -> None:
        """Raise unless the logprobs of servers elsewhere are those of what they sample from.

        They are asked once a start.

        Raises:
            EngineError: a server gives others, or no answer.
        """
        if self.server is not None or self.wire.sampling_probe is None:
            return  # a server that is started here is told which logprobs to give
        start = await self._restarts.current()
        if self._sampling_checked == start:
            return
        assert self._answers is not None, "made by a start"
        for connection in self._answers.connections:
            await check_sampling(
                self._answers,
                connection,
                self.wire,
                self.wire.sampling_probe,
                eos_ids,
                vocab_size=self._identity.vocab_size,
                max_attempts=self.config.max_attempts,
                count=self.count,
            )
        self._sampling_checked = start

    @property
    def _score_client(self) -> ServerClient:
        if self._scores is None:
            raise EngineError("the teacher is not started: start it before the first score")
        return self._scores

    def _connect(self, urls: Sequence[str], api_key: str | None) -> None:
        config = self.config
        self._scores = ServerClient(
            urls,
            path=self.wire.path,
            api_key=api_key,
            max_in_flight=config.max_in_flight,
            timeout_s=config.request_timeout_s,
        )
        self._answers = ServerClient(
            urls,
            path=self.wire.path,
            api_key=api_key,
            max_in_flight=ANSWERS_IN_FLIGHT,
            timeout_s=config.request_timeout_s,
        )

    def _remote_key(self) -> str | None:
        file = self.config.api_key_file
        return None if file is None else read_api_key(file)

    def _new_restarts(self) -> Restarts:
        return Restarts(start=self._start, end=self._end, limit=self.config.max_restarts)

    async def _start(self) -> None:
        """Start or connect to the servers, and wait until each one's answer is checked."""
        server = self.server
        if server is None:
            self._connect(self.config.urls, self._remote_key())
            await together(
                *(self._check_server(connection) for connection in self._score_client.connections)
            )
            return
        if server.on_cpu and self.config.quantization is not None:
            raise ConfigError(
                f"scoring.quantization={self.config.quantization} needs a GPU, and there is "
                "none; set scoring.quantization=null"
            )
        await server.start()
        self._connect([server.url], server.api_key)
        await unless_it_ends(server, self._check_server(self._score_client.connections[0]))
        if self.wire.settle_path is not None:
            await self._score_client.tell(self.wire.settle_path)

    async def _end(self) -> None:
        for client in (self._scores, self._answers):
            if client is not None:
                await client.close()
        if self.server is not None:
            await self.server.close()

    async def _check_server(self, connection: ServerConnection) -> None:
        client, config = self._score_client, self.config
        await wait_for_answer(
            client, connection, config, self.server, wire=self.wire, probe=self._probe
        )
        assert self._expected is not None, "set by start"
        await check_known_answer(
            client,
            connection,
            config,
            await self._expected,
            wire=self.wire,
            vocab_size=self._identity.vocab_size,
            count=self.count,
        )

    async def _ask(
        self, samples: bool, body: bytes, tokens: int, max_bytes: int, timeout_s: float | None
    ) -> bytes:
        """Send a request; repeat it if the server died and was started again."""
        while True:
            start = await self._restarts.current()
            client = self._answers if samples else self._score_client
            assert client is not None, "both clients are made together"
            try:
                return await client.post(
                    body, tokens=tokens, max_bytes=max_bytes, timeout_s=timeout_s
                )
            except Unanswered as error:
                if error.fault.kind is FaultKind.TIMEOUT or not await self._recovered(start):
                    raise
            except Refused:
                self.num_answered += 1
                raise

    async def _recovered(self, start: int) -> bool:
        """Whether the server of that start died and was started again.

        Raises:
            EngineLost: it died more often than it may.
            EngineStartError: it does not start again.
        """
        server = self.server
        if server is None or self._scores is None:  # runs elsewhere, or was closed meanwhile
            return False
        if await self._restarts.current() != start:
            return True
        if server.is_running and not await server.ends_within(DEATH_GRACE_S):
            return await self._restarts.current() != start
        lost = EngineLost(
            f"the {self.wire.engine} server died, after {self._restarts.count} restarts "
            f"(scoring.max_restarts){server.last_output()}"
        )
        await self._restarts.recover(start, lost)
        return True
