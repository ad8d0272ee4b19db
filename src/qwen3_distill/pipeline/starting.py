"""Starts engines concurrently and says meanwhile how far each is."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

from qwen3_distill.recording.text import duration
from qwen3_distill.utils.concurrency import Work, forever, in_turn, together

_INTERVAL_S = 1.0


async def start_engines(
    starts: Mapping[str, Work],
    say: Callable[[str], None],
    *,
    then: Mapping[str, Work] | None = None,
    after: Work = forever,
) -> None:
    """Start engines concurrently; say every second which are starting, and for how long.

    Args:
        then: engines that begin when ``after`` has ended, at the latest when the others have
            started.

    Raises:
        EngineStartError: one does not start; the starts of the others were cancelled.
    """
    began: dict[str, float] = {}
    took_s: dict[str, float] = {}

    async def start_all(named: Mapping[str, Work]) -> None:
        async def timed(name: str, start: Work) -> None:
            began[name] = time.monotonic()
            await start()
            took_s[name] = time.monotonic() - began[name]

        await together(*(timed(name, start) for name, start in named.items()))

    async def report() -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            now = time.monotonic()
            waiting = [
                f"{name} ({duration(now - began[name])})" for name in began if name not in took_s
            ]
            if not waiting:  # between the last start and the end of this task
                continue
            started = [f"{name} after {duration(s)}" for name, s in took_s.items()]
            done = f"; started: {', '.join(started)}" if started else ""
            say(f"starting {', '.join(waiting)}{done}")

    say(f"starting {', '.join(starts)}")
    reporting = asyncio.create_task(report())
    try:
        await in_turn((lambda: start_all(starts), after), (lambda: start_all(then or {}), forever))
    finally:
        reporting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reporting
