"""Starting an engine's process again, once for all who saw it die."""

import asyncio
from collections.abc import Awaitable, Callable

from qwen3_distill.errors import EngineLost, EngineStartError

Action = Callable[[], Awaitable[None]]


class Restarts:
    """Counts the starts of one process, and makes new ones where it is lost.

    Args:
        start: starts the process and opens the engine in it.
        end: ends what is left of the process; may be called more than once.
        restore: gives an engine that was started again what the lost one had.
        limit: how often the process may be started again.
    """

    def __init__(self, *, start: Action, end: Action, restore: Action, limit: int) -> None:
        self._start, self._end, self._restore = start, end, restore
        self._limit = limit
        self._num_starts = 0
        self._is_open = False
        self._lock = asyncio.Lock()

    @property
    def count(self) -> int:
        """Restarts so far."""
        return max(0, self._num_starts - 1)

    async def start(self) -> None:
        """The first start; after `close`, one more."""
        await self._begin()
        self._is_open = True

    async def current(self) -> int:
        """Number of the start that made the process which is there now."""
        async with self._lock:
            return self._num_starts

    async def recover(self, start: int, error: EngineLost) -> None:
        """Bring the engine back.

        Args:
            start: number of the start that the caller saw die.
            error: how.

        Raises:
            EngineLost: it has died more often than it may, or was closed.
            EngineStartError: it did not start again, as often as it may.
        """
        async with self._lock:
            if self._num_starts > start:
                return  # somebody else did
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
        """End the process. May be called more than once."""
        self._is_open = False
        await self._end()

    async def _begin(self) -> None:
        self._num_starts += 1
        try:
            await self._start()
        except BaseException:
            await self._end()
            raise
