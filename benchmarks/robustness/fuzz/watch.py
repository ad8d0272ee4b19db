"""Ends what takes too long, and names where an error was raised."""

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def over_time(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` in the block after ``seconds``. Main thread only."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before: Any = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def raised(error: BaseException) -> str:
    """Return an error with the last place of this package that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "qwen3_distill" in frame.filename] or frames
    place = f"{own[-1].filename.rpartition('/')[2]}:{own[-1].lineno}" if own else "?"
    return f"{type(error).__name__} at {place}: {str(error)[:160]}"
