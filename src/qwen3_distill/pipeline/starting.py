"""Starts engines concurrently and says meanwhile how far each is."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from qwen3_distill.recording.text import duration
from qwen3_distill.utils.concurrency import together

_INTERVAL_S = 1.0


async def start_engines(
    starts: Mapping[str, Coroutine[Any, Any, None]], say: Callable[[str], None]
) -> None:
    """Await all starts; say every second which engines are starting, and for how long.

    Raises:
        EngineStartError: one does not start; the starts of the others were cancelled.
    """
    began = time.monotonic()
    took_s: dict[str, float] = {}

    async def timed(name: str, start: Coroutine[Any, Any, None]) -> None:
        await start
        took_s[name] = time.monotonic() - began

    async def report() -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            elapsed = duration(time.monotonic() - began)
            waiting = [f"{name} ({elapsed})" for name in starts if name not in took_s]
            started = [f"{name} after {duration(s)}" for name, s in took_s.items()]
            done = f"; started: {', '.join(started)}" if started else ""
            say(f"starting {', '.join(waiting)}{done}")

    say(f"starting {', '.join(starts)}")
    reporting = asyncio.create_task(report())
    try:
        await together(*(timed(name, start) for name, start in starts.items()))
    finally:
        reporting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reporting
