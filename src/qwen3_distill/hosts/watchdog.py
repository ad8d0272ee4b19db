"""Waits until a progress counter stops moving."""

import asyncio
from collections.abc import Callable

_TICKS = 10
"""Parts that the time is counted in. What blocks the event loop is one tick, however long."""


async def wait_until_idle(progress: Callable[[], object | None], timeout_s: float) -> None:
    """Return when ``progress`` has been the same for ``timeout_s``. None: nothing is expected."""
    before, still_ticks = progress(), 0
    while still_ticks < _TICKS:
        await asyncio.sleep(timeout_s / _TICKS)
        now = progress()
        still_ticks = still_ticks + 1 if now is not None and now == before else 0
        before = now
