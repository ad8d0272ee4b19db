"""A command in a process group of its own, which cannot outlive this process."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen3_distill.errors import EngineStartError
from qwen3_distill.hosts.guard import kill_group
from qwen3_distill.utils.concurrency import result_within
from qwen3_distill.utils.printable import printable
from qwen3_distill.utils.secrets import is_secret_name, remember_secret, without_secrets

_GUARD = Path(__file__).with_name("guard.py")
_SOURCE = Path(__file__).parents[2]
_LOG_TAIL_BYTES = 4000
_LOG_SEARCH_BYTES = 1 << 20


def engine_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The variables of an engine's process: those of this one, and ``extra``.

    This package is importable there from the files that run here, whatever ``PYTHONPATH`` says.
    """
    for name, value in extra.items():
        if is_secret_name(name):
            remember_secret(value)  # the process may print its variables
    environment = {**os.environ, **extra}
    path = [str(_SOURCE), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def private(path: str, flags: int) -> int:
    """Open a log that only this user may read: a process may print its variables."""
    return os.open(path, flags, 0o600)


def is_absent(program: str) -> bool:
    """Whether a path names nothing that can be run; a bare name is looked up when it is started."""
    return os.sep in program and not os.access(program, os.X_OK)


def how_to_install(engine: str, section: str) -> str:
    """The remedy where an engine is missing; ``section`` of the config names its interpreter."""
    return (
        f"`qwen3-distill engines install {engine}` makes an environment of it, which a run finds "
        f"if {section}.python is null; or name an interpreter that has it (docs/engines/install.md)"
    )


class ChildProcess:
    """A command and everything it starts, ended as one.

    Args:
        name: names the process in errors.
        log: file that takes its output; appended to.
        remove: folders that are removed should this process die without ending the command.
    """

    def __init__(self, name: str, log: Path, remove: Sequence[Path] = ()) -> None:
        self.name = name
        self._log = log
        self._remove = tuple(remove)
        self._log_start = 0
        self._process: asyncio.subprocess.Process | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        """Process id of the guard, which is the process group's leader."""
        return None if self._process is None else self._process.pid

    async def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the command.

        Raises:
            EngineStartError: its program does not exist or cannot be run.
        """
        program = command[0]
        if is_absent(program):
            raise EngineStartError(
                f"{self.name}: {program} does not exist or cannot be run; set `python` to the "
                "interpreter of an environment that has the engine (docs/engines/install.md)"
            )
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "ab", opener=private) as log:
            self._log_start = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                str(_GUARD),
                str(os.getpid()),
                *(f"--remove={folder}" for folder in self._remove),
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C is ours to handle, not the engine's
            )

    async def wait(self) -> int:
        """Wait for the command's end and return its exit status."""
        if self._process is None:
            return 0
        return await self._process.wait()

    async def end(self, *, grace_s: float = 0.0) -> None:
        """Wait ``grace_s`` for it to end by itself, then kill it with everything it started."""
        if self._process is None:
            return
        if grace_s > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                await result_within(grace_s, self._process.wait())
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)  # the guard kills its descendants
                self._process.send_signal(signal.SIGCONT)  # also one that was stopped
            with contextlib.suppress(asyncio.TimeoutError):
                await result_within(10, self._process.wait())
        self.kill()
        await self._process.wait()

    def kill(self) -> None:
        """Kill the whole group with SIGKILL, for a process that hangs."""
        if self._process is not None:
            kill_group(self._process.pid)

    def last_output(self) -> str:
        """The end of its output since its start, for an error message."""
        tail = self.output(_LOG_TAIL_BYTES)
        if not tail:
            return f"; {self._log} is empty"
        return f"; the end of {self._log}:\n{printable(without_secrets(tail))}"

    def output(self, limit_bytes: int = _LOG_SEARCH_BYTES) -> str:
        """Its output since its start, or the end of it."""
        try:
            with self._log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - limit_bytes))
                return log.read().decode(errors="replace").strip()
        except OSError:
            return ""
