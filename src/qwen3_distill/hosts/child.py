"""A command in a process group of its own, which cannot outlive this process."""

import asyncio
import contextlib
import getpass
import os
import shutil
import signal
import sys
import tempfile
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
_LONGEST_TEMPORARY_DIR = 50
"""A Unix socket's path has 107 bytes at most; engines append some 40, and the scratch folder is in
between."""


def engine_environment(extra: Mapping[str, str], folders: Sequence[Path] = ()) -> dict[str, str]:
    """The variables of an engine's process: those of this one, and ``extra``.

    This package is importable there from the files that run here, whatever ``PYTHONPATH`` says.

    Args:
        folders: what else is importable there.
    """
    for name, value in extra.items():
        if is_secret_name(name):
            remember_secret(value)  # the process may print its variables
    environment = {**os.environ, **extra}
    path = [str(_SOURCE), *map(str, folders), environment.get("PYTHONPATH", "")]
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


def short_temporary_dir(longest: int = _LONGEST_TEMPORARY_DIR) -> str:
    """Return a folder for temporary files whose path leaves room for the names of Unix sockets.

    Args:
        longest: characters of the usual folder's path; instead of a longer one it is ``/tmp``.
    """
    usual = tempfile.gettempdir()
    if len(usual) > longest and os.access("/tmp", os.W_OK):
        return "/tmp"
    return usual


def _compiled_kernels() -> dict[str, str]:
    """Return the variable that keeps PyTorch's compiled kernels where they lie by default.

    By default they are among the temporary files, which a command has for itself.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    folder = os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")
    return {"TORCHINDUCTOR_CACHE_DIR": folder}


class ChildProcess:
    """A command and everything it starts, ended as one.

    Its temporary files lie in a folder of their own, which is removed when it has ended, also by
    SIGKILL and also when this process died before: engines leave sockets behind.

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
        self._scratch: Path | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def scratch(self) -> Path:
        """The folder of the temporary files of the command that runs, or of the next one.

        Only this user can enter it.
        """
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="q3d-", dir=short_temporary_dir()))
        return self._scratch

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
                f"--scratch={self.scratch}",
                *(f"--remove={folder}" for folder in self._remove),
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._with_folders(environment),
                start_new_session=True,  # Ctrl-C is ours to handle, not the engine's
            )

    def _with_folders(self, environment: Mapping[str, str]) -> dict[str, str]:
        # At the end: a process cannot give itself a title once its first variable was set anew.
        found = {**environment}
        for name, value in _compiled_kernels().items():
            found.setdefault(name, value)
        if environment.get("TMPDIR") == os.environ.get("TMPDIR"):  # the config names no other
            found["TMPDIR"] = str(self.scratch)
        return found

    async def wait(self) -> int:
        """Wait for the command's end and return its exit status."""
        if self._process is None:
            return 0
        return await self._process.wait()

    async def end(self, *, grace_s: float = 0.0) -> None:
        """Wait ``grace_s`` for it to end by itself, then kill it with everything it started."""
        # The next start may come before this ends: it has a process and a folder of its own.
        process, scratch, self._scratch = self._process, self._scratch, None
        try:
            if process is not None:
                await _ended(process, grace_s)
        finally:
            if scratch is not None:  # a guard that was killed has left it
                shutil.rmtree(scratch, ignore_errors=True)

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


async def _ended(process: asyncio.subprocess.Process, grace_s: float) -> None:
    """Wait ``grace_s`` for a guard to end by itself, then kill it with its descendants."""
    if grace_s > 0:
        with contextlib.suppress(asyncio.TimeoutError):
            await result_within(grace_s, process.wait())
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)  # the guard kills its descendants
            process.send_signal(signal.SIGCONT)  # also one that was stopped
        with contextlib.suppress(asyncio.TimeoutError):
            await result_within(10, process.wait())
    kill_group(process.pid)
    await process.wait()
