"""Standard output and error that may be closed while a command works.

A pipe whose reader has ended (``| head -1``, a dead ``tee``) and a closed terminal fail at every
write. The command's work goes on: its records are files. What is printed from then on is dropped.
"""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

_CLOSED = {errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN}
"""Errors of a write to a pipe, terminal or connection that has no other end any more."""

_losses: list[str] = []
_announce: list[Callable[[str], None]] = []


def output_losses() -> tuple[str, ...]:
    """Return a line for each output of the current command that was lost, in order."""
    return tuple(_losses)


def announce_loss(say: Callable[[str], None]) -> None:
    """Have ``say`` called when the current command loses an output.

    For commands whose result is not their output. The others end quietly.
    """
    _announce.append(say)


@contextmanager
def surviving_output() -> Iterator[None]:
    """Within the block, a closed standard output or error loses what is printed, nothing else."""
    _losses.clear()
    _announce.clear()
    _open_missing_descriptors()
    before = sys.stdout, sys.stderr
    streams = [_Surviving(before[0], "standard output"), _Surviving(before[1], "standard error")]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before


class _Surviving:
    """A text stream whose writes are dropped once its other end is closed."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._is_lost = False

    def write(self, text: str) -> int:
        self._attempt(lambda: self._write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # a terminal of another encoding than UTF-8
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._is_lost:
            return
        with suppress(OSError, io.UnsupportedOperation, ValueError):
            # Another user of the terminal may have made it non-blocking: text would be lost.
            os.set_blocking(self._stream.fileno(), True)
        try:
            action()
        except OSError as error:
            if error.errno not in _CLOSED:
                raise
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self._is_lost = True
        with suppress(OSError, io.UnsupportedOperation):
            # What is still buffered and what other libraries print must not fail either.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        loss = f"{self._name} is closed ({error.strerror}): what is printed there is dropped"
        _losses.append(loss)
        for say in _announce:
            say(loss)


def _open_missing_descriptors() -> None:
    """Open descriptors that the caller closed (``>&-``); files would get their numbers."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            if getattr(sys, name) is None:
                mode = "r" if name == "stdin" else "w"
                setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))
