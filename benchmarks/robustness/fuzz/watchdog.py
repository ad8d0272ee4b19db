"""A time limit for work that may never end."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Hang(BaseException):
    """The work did not end in time. No handler of `Exception` catches it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the block when it takes longer; for the main thread."""

    def expired(signum: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
