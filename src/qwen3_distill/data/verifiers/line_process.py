"""A process that answers one line of JSON with one line of JSON, and is replaced when it died."""

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwen3_distill.errors import EngineError


class LineProcess:
    """Calls a script like a function. Thread-safe; calls take turns.

    The first call starts the process; so does the first call after it died.

    Args:
        script: file name of the script, beside this module.
        arguments: its command line.
        cannot_start: what to say when the process ends before it is ready, after its status.
    """

    def __init__(self, script: str, arguments: Sequence[str], cannot_start: str) -> None:
        self._command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        self._cannot_start = cannot_start
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._greeting: Any = None

    def ask(self, question: object) -> Any:
        """Return the answer; None if the process died over the question."""
        with self._lock:
            line = _exchange(self._running(), json.dumps(question))
        return json.loads(line) if line else None

    def start(self) -> Any:
        """Start the process if none runs; return what it said first, if it ended after that."""
        with self._lock:
            self._running()
            return self._greeting

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        if self._process is not None:
            self._finalizer()
        self._process, self._greeting = _started(self._command, self._cannot_start)
        # Ends the process when this object is deleted or the interpreter exits.
        self._finalizer = weakref.finalize(self, _end, self._process)
        return self._process


def _exchange(process: "subprocess.Popen[str]", line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        process.wait()  # else `poll` could still report it alive, and nothing would restart it
    return answer


def _started(command: Sequence[str], cannot_start: str) -> "tuple[subprocess.Popen[str], Any]":
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert process.stdout is not None
    greeting = process.stdout.readline()
    if not greeting:
        _end(process)
        raise EngineError(cannot_start.format(status=process.returncode))
    return process, json.loads(greeting)


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # closing flushes to a process that no longer reads
                pipe.close()
