"""Starting an engine again that was lost, once for all callers that saw it die."""

import asyncio
from collections.abc import Awaitable, Callable

from qwen3_distill.errors import EngineLost, EngineStartError

Action = Callable[[], Awaitable[None]]


async def _nothing() -> None:
    """An engine without a state has nothing to restore."""


class Restarts:
    """Counts the starts of one engine and starts it again when it was lost.

    Restarts every engine but a learner: engines behind a `Host`, and servers that answer over
    HTTP. A
    caller reads `current` before it asks the engine. When it sees the engine die, it passes that
    number to `recover`, which starts the engine once, however many callers saw the death. Whether a
    request without an answer is a death is for the caller to find out.

    Args:
        start: starts the engine.
        end: ends what is left of it; may be called more than once.
        restore: gives an engine that was started again the state of the lost one; default: none.
        limit: how often the engine may be started again.
    """

    def __init__(
        self, *, start: Action, end: Action, restore: Action = _nothing, limit: int
    ) -> None:
        self._start, self._end, self._restore = start, end, restore
        self._limit = limit
        self._num_starts = 0
        self._is_open = False
        self._lock = asyncio.Lock()

    @property
    def count(self) -> int:
        """Restarts so far: the value of an engine's restart counter."""
        return max(0, self._num_starts - 1)

    async def start(self) -> None:
        """Make the first start; after `close`, one more."""
        await self._begin()
        self._is_open = True

    async def current(self) -> int:
        """Return the number of the start that made the engine that runs now."""
        async with self._lock:
            return self._num_starts

    async def recover(self, start: int, error: EngineLost) -> None:
        """Bring the engine back.

        Args:
            start: number of the start that the caller saw die.
            error: how.

        Raises:
            EngineLost: it died more often than the limit allows, or was closed.
            EngineStartError: it did not start again, in as many attempts as the limit allows.
        """
        async with self._lock:
            if self._num_starts > start:
                return  # another caller did
            last: EngineLost | EngineStartError = error
            while self._is_open and self._num_starts <= self._limit:
                await self._end()
                try:
                    await self._begin()
                    return await self._restore()
                except (EngineLost, EngineStartError) as again:
                    last = again
            raise last

    async def close(self) -> None:
        """End the engine. May be called more than once."""
        self._is_open = False
        await self._end()

    async def _begin(self) -> None:
        self._num_starts += 1
        try:
            await self._start()
        except BaseException:
            await self._end()
            raise
