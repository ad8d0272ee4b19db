"""Several rollout engines behind one port, wherever each of them runs.

A request goes to the replica with the fewest outstanding tokens, and a prompt's samples to one
replica, which can share the prompt's work. A replica that dies or hangs is started again and serves
nothing until it has loaded the version that is wanted, its digest read back. Meanwhile its
unfinished requests are sampled elsewhere, with the same seeds; no rollout is yielded twice.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from qwen3_distill.errors import EngineError, EngineLost, WeightVersionError
from qwen3_distill.hosts.fleet_state import FleetState, MemberState
from qwen3_distill.hosts.members import Members, Span, no_span
from qwen3_distill.hosts.routing import OutstandingTokens
from qwen3_distill.ports import StreamingRolloutEngine, WeightChannel
from qwen3_distill.types import Rollout, RolloutPrefix, RolloutRequest, WeightVersion
from qwen3_distill.utils.concurrency import together

Deliver = Callable[[int, WeightVersion, WeightChannel], Awaitable[WeightChannel]]
"""Brings a version to where a replica runs; returns a channel that can be used there."""


async def already_there(
    index: int, version: WeightVersion, channel: WeightChannel
) -> WeightChannel:
    """A `Deliver` for replicas that can use the run's channel itself."""
    return channel


@dataclass(frozen=True)
class _Wanted:
    version: WeightVersion
    channel: WeightChannel


@dataclass(frozen=True)
class _Ended:
    """A replica's answer to a batch has ended."""

    replica: int
    start: int
    batch: tuple[RolloutRequest, ...]
    error: EngineLost | None


class RolloutFleet:
    """A `StreamingRolloutEngine` over several.

    Args:
        replicas: the engines; none restarts itself.
        max_restarts: how often each may be started again.
        minimum: with fewer replicas left, the fleet fails.
        deliver: see `Deliver`.
        warn: told of every loss.
    """

    def __init__(
        self,
        replicas: Sequence[StreamingRolloutEngine],
        *,
        max_restarts: int,
        minimum: int = 1,
        deliver: Deliver = already_there,
        warn: Callable[[str], None],
    ) -> None:
        self._state = FleetState(len(replicas), max_restarts=max_restarts, minimum=minimum)
        self._members = Members(
            "rollout replica", replicas, self._state, verify=self._verify, warn=warn
        )
        self._deliver = deliver
        self._outstanding = OutstandingTokens(len(replicas))
        self._wanted: _Wanted | None = None
        self._served: WeightVersion | None = None
        self._last_served: WeightVersion | None = None
        """Stays during a load, in which nothing is served."""
        self._problems: dict[int, WeightVersionError] = {}
        """Why replicas that run are stale."""
        self._paused = False
        self._loading = asyncio.Lock()
        self._replica_locks = [asyncio.Lock() for _ in replicas]
        self._missing: list[dict[str, RolloutRequest]] = []
        """Per call of `generate`: the requests it has yet to answer, by id."""
        self._tokens_sampled = [0] * len(replicas)
        self._loaded: dict[int, WeightVersion] = {}
        """The version that each replica was seen to serve last."""
        self.span: Span = no_span
        """Records that a replica works; set by the run's recorder."""

    @property
    def replicas(self) -> tuple[StreamingRolloutEngine, ...]:
        return self._members.engines

    @property
    def state(self) -> FleetState:
        return self._state

    def tell(self, say: Callable[[str], None]) -> None:
        """Tell ``say`` whenever nothing serves, and what is waited for."""
        self._members.say = say

    @property
    def awaited(self) -> str:
        """The replicas that do not serve, in words; empty if all do."""
        return self._members.awaited

    @property
    def counters(self) -> Mapping[str, float]:
        """Restarts of all, and per replica: tokens sampled, queue, restarts, version lag."""
        found: dict[str, float] = {"health/rollout_engine_restarts": self._state.num_restarts}
        serving = self._state.serving
        found["fleet/rollout_replicas_serving"] = len(serving)
        for i in range(len(self.replicas)):
            found[f"fleet/rollout_{i}_tokens"] = self._tokens_sampled[i]
            found[f"fleet/rollout_{i}_restarts"] = self._state.restarts_of(i)
            found[f"fleet/rollout_{i}_queue_tokens"] = self._outstanding.of(i)
            if self._last_served is not None and i in self._loaded:
                lag = self._last_served.step - self._loaded[i].step
                found[f"fleet/rollout_{i}_lag_steps"] = max(0, lag)
        return found

    @property
    def version(self) -> WeightVersion:
        if self._served is None:
            raise WeightVersionError(
                "the rollout engine has no weights yet: load a published version before the "
                "first rollout"
            )
        return self._served

    async def start(self) -> None:
        """Start all replicas.

        Raises:
            EngineStartError: none starts.
        """
        await self._members.start()

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        """Load ``version`` into every replica that runs; the others load it when they run again.

        Returns once all that ran have loaded it or were lost, and at least one serves.

        Raises:
            WeightVersionError: the weights in use of no replica are ``version``.
            EngineLost: too few replicas are left.
        """
        async with self._loading:
            self._served = None
            self._wanted = _Wanted(version, channel)
            self._problems.clear()
            for index in self._state.serving:
                self._state.outdated(index, self._state.start_of(index))
            stale = self._state.in_state(MemberState.STALE)
            async with self._members.saying("to load the new weights"):
                await together(*(self._load_or_report(index) for index in stale))
            if not await self._members.serving():
                self._wanted = None
                raise next(iter(self._problems.values()))
            self._served = self._last_served = version
            for index, problem in tuple(self._problems.items()):  # the others show that it can be
                self._members.report_lost(index, self._state.start_of(index), problem)

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        missing = {request.rollout_id: request for request in requests}
        self._missing.append(missing)
        events: asyncio.Queue[tuple[int, Rollout] | _Ended | Exception] = asyncio.Queue()
        given: dict[str, int] = {}
        """The replica that each request was given to, until its tokens are taken off."""
        asking: set[asyncio.Task[None]] = set()
        try:
            await self._dispatch(tuple(missing.values()), given, asking, events)
            num_open = len(asking)
            while num_open:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, _Ended):
                    num_open -= 1
                    before = len(asking)
                    await self._again(event, missing, given, asking, events)
                    num_open += len(asking) - before
                    continue
                replica, rollout = event
                request = missing.pop(rollout.rollout_id, None)
                self._take_off(given, rollout.rollout_id, request)
                if request is not None:
                    self._tokens_sampled[replica] += rollout.num_tokens
                    yield rollout
        finally:
            self._missing = [other for other in self._missing if other is not missing]
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            for request in requests:
                self._take_off(given, request.rollout_id, request)

    async def prefixes(self) -> list[RolloutPrefix]:
        answers = await self._ask_all(lambda engine: engine.prefixes())
        return [prefix for prefixes in answers for prefix in prefixes]

    async def abort(self, rollout_ids: Sequence[str]) -> None:
        for missing in self._missing:
            for rollout_id in rollout_ids:
                missing.pop(rollout_id, None)
        await self._ask_all(lambda engine: engine.abort(rollout_ids))

    async def pause(self) -> None:
        self._paused = True
        await self._ask_all(lambda engine: engine.pause())

    async def resume(self) -> None:
        self._paused = False
        await self._ask_all(lambda engine: engine.resume())

    async def close(self) -> None:
        self._paused = False
        self._served = self._last_served = self._wanted = None
        await self._members.close()

    # --- Sampling ---------------------------------------------------------------------------------

    async def _dispatch(
        self,
        requests: Sequence[RolloutRequest],
        given: dict[str, int],
        asking: set[asyncio.Task[None]],
        events: "asyncio.Queue[tuple[int, Rollout] | _Ended | Exception]",
    ) -> None:
        """Divide requests among the replicas that serve, and ask each once."""
        async with self._loading:  # wait for a load under way
            _ = self.version  # nothing is sampled without weights
            serving = await self._members.serving()
            if not serving:
                raise next(iter(self._problems.values()), EngineError("no replica serves"))
        batches: dict[int, list[RolloutRequest]] = {}
        for _, group in groupby(requests, key=lambda request: request.prompt.prompt_id):
            members = list(group)
            replica = self._outstanding.least(serving)
            batches.setdefault(replica, []).extend(members)
            for request in members:
                given[request.rollout_id] = replica
                self._outstanding.add(replica, _tokens(request))
        for replica, batch in batches.items():
            start = self._state.start_of(replica)
            asking.add(asyncio.create_task(self._ask(replica, start, tuple(batch), events)))

    async def _ask(
        self,
        replica: int,
        start: int,
        batch: tuple[RolloutRequest, ...],
        events: "asyncio.Queue[tuple[int, Rollout] | _Ended | Exception]",
    ) -> None:
        """Put a replica's rollouts into ``events``, and then how its answer ended."""
        try:
            stream = self.replicas[replica].generate(batch)
            with self.span(f"rollout_{replica}", f"{len(batch)} rollouts"):
                async with contextlib.aclosing(stream):  # type: ignore[type-var]
                    async for rollout in stream:
                        events.put_nowait((replica, rollout))
            events.put_nowait(_Ended(replica, start, batch, None))
        except EngineLost as error:
            events.put_nowait(_Ended(replica, start, batch, error))
        except WeightVersionError as error:
            # A replica that was lost and is being started again has no weights.
            was_lost = not self._state.is_current(replica, start)
            lost = EngineLost(f"it was lost before it was asked: {error}")
            events.put_nowait(_Ended(replica, start, batch, lost) if was_lost else error)
        except Exception as error:  # noqa: BLE001 - handed to the consumer
            events.put_nowait(error)

    async def _again(
        self,
        ended: _Ended,
        missing: Mapping[str, RolloutRequest],
        given: dict[str, int],
        asking: set[asyncio.Task[None]],
        events: "asyncio.Queue[tuple[int, Rollout] | _Ended | Exception]",
    ) -> None:
        """Ask elsewhere for what a replica was given and has not answered."""
        for request in ended.batch:
            self._take_off(given, request.rollout_id, request)
        if ended.error is not None:
            self._members.report_lost(ended.replica, ended.start, ended.error)
        unanswered = [request for request in ended.batch if request.rollout_id in missing]
        if not unanswered:
            return
        if ended.error is None:
            async with self._loading:
                if self._served is None:  # a load failed everywhere: like aborted
                    return
        await self._dispatch(unanswered, given, asking, events)

    def _take_off(
        self, given: dict[str, int], rollout_id: str, request: RolloutRequest | None
    ) -> None:
        replica = given.get(rollout_id)
        if replica is not None and request is not None:
            del given[rollout_id]
            self._outstanding.remove(replica, _tokens(request))

    # --- Replicas ---------------------------------------------------------------------------------

    async def _verify(self, index: int, start: int) -> None:
        """Load what is wanted into a replica that runs; it serves if that is still wanted then."""
        async with self._replica_locks[index]:
            engine = self.replicas[index]
            if self._paused:
                await engine.pause()
            while (wanted := self._wanted) is not None:
                self._problems.pop(index, None)
                try:
                    channel = await self._deliver(index, wanted.version, wanted.channel)
                    await engine.load(wanted.version, channel)
                except WeightVersionError as error:
                    if self._wanted is wanted:
                        self._problems[index] = error
                        return
                    continue
                self._loaded[index] = wanted.version
                if self._wanted is wanted:
                    self._state.verified(index, start)
                    self._members.notify()
                    return

    async def _load_or_report(self, index: int) -> None:
        start = self._state.start_of(index)
        try:
            await self._verify(index, start)
        except EngineLost as error:
            self._members.report_lost(index, start, error)

    async def _ask_all(self, call: Callable[[StreamingRolloutEngine], Awaitable]) -> list:
        """Call every replica that runs; one that dies is reported and gives no answer."""

        async def one(index: int) -> list:
            start = self._state.start_of(index)
            try:
                return [await call(self.replicas[index])]
            except EngineLost as error:
                self._members.report_lost(index, start, error)
                return []

        running = self._state.in_state(MemberState.STALE, MemberState.SERVING)
        return [answer for found in await together(*(one(i) for i in running)) for answer in found]


def _tokens(request: RolloutRequest) -> int:
    """The tokens that a request may cost: its prompt, and the longest response."""
    return int(request.prompt.token_ids.size) + request.sampling.max_new_tokens
