"""Signals that ask a command to stop: Ctrl-C, SIGTERM, and SIGHUP when its terminal is closed.

`signals_as_ctrl_c` wraps a command's work and turns the other two into Ctrl-C, so that the work's
handling of Ctrl-C serves all three.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeAlias

_Handler: TypeAlias = Callable[[int, FrameType | None], None]


@contextmanager
def stop_on_ctrl_c(ask: Callable[[], None]) -> Iterator[None]:
    """Within the block, the first Ctrl-C calls ``ask``; later ones raise KeyboardInterrupt."""
    asked = False

    def once(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        ask()

    with _handled(once, (signal.SIGINT,)):
        yield


@contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP act like Ctrl-C, so that nothing is left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        on_ctrl_c = signal.getsignal(signal.SIGINT)  # asyncio's, while it runs
        if not callable(on_ctrl_c):  # ignored in the background of a script
            raise KeyboardInterrupt
        on_ctrl_c(signal.SIGINT, frame)

    with _handled(interrupt, (signal.SIGTERM, signal.SIGHUP)):
        yield


@contextmanager
def ctrl_c_ignored() -> Iterator[None]:
    """Within the block, Ctrl-C has no effect: for the moment in which results are saved."""
    with _handled(lambda number, frame: None, (signal.SIGINT,)):
        yield


@contextmanager
def _handled(handler: _Handler, numbers: Sequence[signal.Signals]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # handlers are set only there
        yield
        return
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def handle(number: int, frame: FrameType | None) -> None:
        _leave_closed(terminals)
        handler(number, frame)

    # Under nohup SIGHUP is ignored, and stays so.
    watched = [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in watched}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _leave_closed(terminals: Sequence[int]) -> None:
    """Discard output to a closed terminal: writing to it would fail work that is to be saved."""
    for descriptor in terminals:
        if not os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
