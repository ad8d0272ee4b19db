"""Keeps ``status.json``: where a run is now, for a reader in another process."""

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from qwen3_distill.recording.console import ProgressReporter
from qwen3_distill.recording.trace import Trace

STATUS_FILE = "status.json"
_INTERVAL_S = 1.0
_REFRESH_S = 30.0
"""After this time the file is written again although nothing has changed."""


class HeartbeatReporter:
    """A `ProgressReporter` that passes everything on and keeps a run's `STATUS_FILE`.

    A thread writes the file when something has changed, at most once a second: a stage that blocks
    the event loop is seen as well. A file that cannot be written does not disturb the run. A first
    start that fails before it trains leaves no file.

    Args:
        path: the file. The folder exists.
        total_steps: the run's number of steps.
    """

    def __init__(self, inner: ProgressReporter, path: Path, *, total_steps: int) -> None:
        self._inner, self._path = inner, path
        self._fields: dict[str, Any] = {
            "steps": total_steps,
            "step": None,
            "stage": "starting",
            "stage_since": time.time(),
            "ended": None,
            **this_process(),
        }
        self._trace: Trace | None = None
        self._leaves_file = path.exists()
        self._written: dict[str, Any] = {}
        self._written_at = -_REFRESH_S
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="heartbeat", daemon=True)

    def watch(self, trace: Trace) -> None:
        """Show from now on which stages of the trace are at work."""
        self._trace = trace
        self._leaves_file = True

    def stage(self, text: str) -> None:
        self._fields |= {"stage": text, "stage_since": time.time()}
        self._inner.stage(text)

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        self._fields |= {"step": step, "stage": None, "stage_since": None}
        self._inner.step(step, values)

    def note(self, text: str) -> None:
        self._inner.note(text)

    def evaluation(self, result: Mapping[str, Any]) -> None:
        self._fields |= {"stage": None, "stage_since": None}
        self._inner.evaluation(result)

    def finish(self, summary: Mapping[str, Any], report_path: Path | None) -> None:
        self._inner.finish(summary, report_path)

    def end(self, how: str) -> None:
        """Note how the run ended: it is the last thing in the file."""
        if self._fields["ended"] is None:
            self._fields |= {"ended": how}

    def close(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._trace = None
        if self._leaves_file:
            self._write()
        else:
            with suppress(OSError):
                self._path.unlink()

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            interrupted = issubclass(exc_type, KeyboardInterrupt)
            text = str(exc).splitlines()[0] if str(exc) else exc_type.__name__
            self.end("stopped" if interrupted else f"failed: {text}")
        self.close()

    def _keep_writing(self) -> None:
        while not self._over.wait(_INTERVAL_S):
            self._write()

    def _write(self) -> None:
        """Write the file if it has changed, whole or not at all; a crash may lose it."""
        working = {} if self._trace is None else self._trace.open_stages()
        content = self._fields | {"working": {name: round(at, 3) for name, at in working.items()}}
        now = time.monotonic()
        if content == self._written and now - self._written_at < _REFRESH_S:
            return
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps(content | {"time": time.time()}), encoding="utf-8")
            os.replace(temporary, self._path)
            self._written, self._written_at = content, now


def this_process() -> dict[str, Any]:
    """Return what identifies this process: host, boot, number and start."""
    pid = os.getpid()
    return {
        "pid": pid,
        "pid_start": _start_of(pid),
        "host": socket.gethostname(),
        "boot": _boot_id(),
    }


def is_alive(status: Mapping[str, Any]) -> bool | None:
    """Whether the process of a status file runs; None where it cannot be seen from here."""
    if status.get("host") != socket.gethostname() or status.get("boot") != _boot_id():
        return None if status.get("host") != socket.gethostname() else False
    pid = status.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user, but there
        pass
    start = _start_of(pid)
    return start == status.get("pid_start")


def _start_of(pid: int) -> str | None:
    """Return the start time of a process in clock ticks, or None where there is no /proc."""
    with suppress(OSError, IndexError):
        # The name in parentheses may contain spaces; the start is the 20th field after it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    return None


def _boot_id() -> str | None:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None
