"""Starts the members of a fleet, and starts those again that are lost.

`fleet_state.FleetState` decides; this performs what it decides. Ray's own restarts are off: an
engine that Ray had restarted would serve old weights, and nobody would know.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar

from qwen3_distill.errors import EngineLost, EngineStartError
from qwen3_distill.hosts.fleet_state import FleetState, MemberState


class Engine(Protocol):
    """A fleet's member can be started again after it was closed."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...


Span = Callable[[str, str], AbstractContextManager[None]]
"""Records that a member, whose name comes first, works on something in the block."""


def no_span(member: str, work: str) -> AbstractContextManager[None]:
    """A `Span` of a fleet that nobody watches."""
    return contextlib.nullcontext()


def _say_nothing(text: str) -> None:
    """Say nothing: nobody listens yet."""


_PATIENCE_S = 5.0
"""How long something may take before it is said what is waited for, and again after it."""

EngineT = TypeVar("EngineT", bound=Engine)
Verify = Callable[[int, int], Awaitable[None]]
"""Brings a started member, given by index and number of its start, to SERVING if what it holds is
what is wanted. It may leave the member STALE. It raises `EngineLost` if the member dies."""


class Members(Generic[EngineT]):
    """A fleet's engines with their states.

    Args:
        what: names a member in messages, e.g. "rollout replica".
        engines: in the order of the states.
        verify: see `Verify`.
        warn: told of every loss, once.
    """

    def __init__(
        self,
        what: str,
        engines: Sequence[EngineT],
        state: FleetState,
        *,
        verify: Verify,
        warn: Callable[[str], None],
    ) -> None:
        self.what = what
        self.engines = tuple(engines)
        self.state = state
        self.say: Callable[[str], None] = _say_nothing
        """Told what is waited for."""
        self._verify = verify
        self._warn = warn
        self._changed = asyncio.Event()
        self._restarting: set[asyncio.Task[None]] = set()
        self._failure: Exception | None = None
        self._is_open = self._was_open = False

    async def start(self) -> None:
        """Start all members concurrently, and verify them.

        A member that fails is started again within its budget, if another one started.

        Raises:
            EngineStartError: none started; the error of the first.
        """
        if self._was_open:
            self.state.begin_anew()
        self._is_open = self._was_open = True
        self._failure = None
        errors = await asyncio.gather(
            *(self._first_start(i) for i in range(len(self.engines))), return_exceptions=True
        )
        failed = [error for error in errors if isinstance(error, BaseException)]
        for error in failed:
            if not isinstance(error, EngineLost | EngineStartError):
                await self.close()
                raise error
        if len(failed) == len(self.engines):
            await self.close()
            raise failed[0]
        for index, error in enumerate(errors):
            if isinstance(error, Exception):
                self.report_lost(index, self.state.start_of(index), error)
        self.notify()

    def report_lost(self, index: int, start: int, error: Exception) -> None:
        """Note that a member died in its start number ``start``, and start it again.

        Any number of callers may report the same death.
        """
        if not self._is_open or not self.state.lost(index, start, str(error)):
            return
        is_over = self.state.state(index) is MemberState.RETIRED
        next_step = "it is retired: its restarts are used up" if is_over else "it is started again"
        self._warn(f"{self.what} {index} was lost and {next_step}: {error}")
        self.notify()
        if is_over:
            return
        task = asyncio.create_task(self._bring_back(index))
        self._restarting.add(task)
        task.add_done_callback(self._restarted)

    async def serving(self) -> list[int]:
        """Wait until at least one member serves; return the indices of those that do.

        Raises:
            EngineLost: too few members are left.
        """
        while True:
            self.check()
            if self.state.serving:
                return self.state.serving
            is_awaited = self.state.in_state(MemberState.STARTING, MemberState.LOST)
            if not is_awaited and not self._restarting:
                return []  # the caller knows why a member that runs is not verified
            self.say(f"waiting for {self.awaited}")
            self._changed.clear()
            await self._changed.wait()

    def check(self) -> None:
        """Check that enough members are left, and that the fleet is open.

        Raises:
            EngineLost: too few are left, or the fleet was closed.
            EngineError: a restart failed for another reason than a death.
        """
        if self._failure is not None:
            raise self._failure
        if not self._is_open:
            raise EngineLost(f"the fleet of {self.what}s is not running: start it first")
        try:
            self.state.check()
        except EngineLost as error:
            raise EngineLost(f"the fleet of {self.what}s: {error}") from None

    @property
    def awaited(self) -> str:
        """The members that do not serve, in words for a progress line; empty if all do."""
        others = self.state.in_state(
            MemberState.STARTING, MemberState.STALE, MemberState.LOST, MemberState.RETIRED
        )
        return ", ".join(f"{self.what} {i} ({self.state.state(i).value})" for i in others)

    @contextlib.asynccontextmanager
    async def saying(self, what_for: str) -> AsyncIterator[None]:
        """Say now and then, while the block takes long, which members are waited for."""

        async def say() -> None:
            while True:
                await asyncio.sleep(_PATIENCE_S)
                if awaited := self.awaited:
                    self.say(f"waiting for {awaited} {what_for}")

        saying = asyncio.create_task(say())
        try:
            yield
        finally:
            saying.cancel()

    def notify(self) -> None:
        """Wake all that wait for a state."""
        self._changed.set()

    async def close(self) -> None:
        """End all members. May be called more than once; `start` after it begins anew."""
        self._is_open = False
        for task in tuple(self._restarting):
            task.cancel()
        await asyncio.gather(*self._restarting, return_exceptions=True)
        self.notify()
        results = await asyncio.gather(
            *(engine.close() for engine in self.engines), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, EngineLost):
                raise result

    async def _first_start(self, index: int) -> None:
        start = self.state.start_of(index)
        await self.engines[index].start()
        self.state.started(index, start)
        await self._verify(index, start)

    async def _bring_back(self, index: int) -> None:
        """Start a lost member until it runs or is retired."""
        while self._is_open and self.state.state(index) is MemberState.LOST:
            start = self.state.restarting(index)
            engine = self.engines[index]
            try:
                with contextlib.suppress(EngineLost):
                    await engine.close()
                await engine.start()
                self.state.started(index, start)
                await self._verify(index, start)
            except (EngineLost, EngineStartError) as error:
                self.state.lost(index, start, str(error))
                if self.state.state(index) is MemberState.RETIRED:
                    self._warn(f"{self.what} {index} is retired: {error}")
            except Exception as error:  # noqa: BLE001 - every caller that waits must see it
                self._failure = error
            self.notify()
            if self._failure is not None:
                return

    def _restarted(self, task: asyncio.Task[None]) -> None:
        """Forget a restart that ended, and wake those who wait for its end."""
        self._restarting.discard(task)
        self._changed.set()
