"""A scoring server on loopback: its start, its key, its end and what its log says."""

import asyncio
import re
import secrets
import socket
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
import yaml
from pydantic import JsonValue

from qwen3_distill.config import ServedScoring
from qwen3_distill.environments.installed import engine_python
from qwen3_distill.errors import EngineStartError
from qwen3_distill.hosts.child import ChildProcess, engine_environment, how_to_install
from qwen3_distill.hosts.reserved_port import ReservedPort
from qwen3_distill.utils.concurrency import result_within
from qwen3_distill.utils.secrets import remember_secret

HOST = "127.0.0.1"
_LOG_SEARCH_BYTES = 1 << 20
_LOG_POLL_S = 0.2

Options: TypeAlias = dict[str, JsonValue]


class EngineServer(ABC):
    """A server process.

    Args:
        log: file that takes the server's output; appended to, readable by this user only.
    """

    kind: ClassVar[str]
    """The value of ``scoring.kind``, and the name of the engine's Python package."""
    engine: ClassVar[str]
    """The engine's name in errors."""
    module: ClassVar[str]
    """The module that ``python -m`` runs."""
    unknown: ClassVar["re.Pattern[str]"]
    """How the engine's log ends when it lacks an option, module or name that we use."""

    def __init__(self, config: ServedScoring, *, log: Path) -> None:
        self._settings = config
        self._log = log
        self._log_start = 0
        self._process = ChildProcess(f"the {self.engine} server", log)
        self._reserved: ReservedPort | None = None
        """A port of the server's own, if the config names none."""
        self._python = ""
        self.url = ""
        self.api_key = ""

    @property
    def is_running(self) -> bool:
        return self._process.is_running

    @property
    def pid(self) -> int | None:
        """Leader of the process group that holds the server."""
        return self._process.pid

    @property
    def on_cpu(self) -> bool:
        device = self._settings.device
        return device == "cpu" or (device == "auto" and not torch.cuda.is_available())

    async def start(self) -> None:
        """Start the process. It answers once it has loaded the model, or ends.

        Raises:
            EngineStartError: the port is taken, or the interpreter cannot be run.
            ConfigError: no interpreter is named and no environment of the engine is installed.
        """
        self._python = engine_python(self.kind, "scoring", self._settings.python)
        await self.close()
        port = self._port()
        self.url = f"http://{HOST}:{port}"
        self.api_key = secrets.token_hex(16)
        remember_secret(self.api_key)
        # A key may be passed in this file: every user can read a command line. SGLang also writes
        # its settings, the key among them, into its log.
        file = self._process.scratch / "server.yaml"
        file.write_text(yaml.safe_dump(self._options(port)), encoding="utf-8")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.touch(mode=0o600)
        self._log_start = self._log.stat().st_size
        command = [self._python, "-m", self.module, "--config", str(file)]
        variables = self._variables() | self._settings.environment
        folders = self._importable(self._process.scratch)
        await self._process.start(command, engine_environment(variables, folders))

    async def wait(self) -> None:
        """Wait until the process has ended."""
        await self._process.wait()

    async def ends_within(self, seconds: float) -> bool:
        """Whether the process has ended, or ends within ``seconds``."""
        try:
            await result_within(seconds, self._process.wait())
        except asyncio.TimeoutError:
            return False
        return True

    async def memory_taken(self) -> None:
        """Wait until its log says that it has taken its memory; if it never does, for ever."""
        while not self._has_its_memory(self._log_text()):
            await asyncio.sleep(_LOG_POLL_S)

    def _has_its_memory(self, text: str) -> bool:
        """Whether the engine's log of this start says that it takes no more memory."""
        return False

    def last_output(self) -> str:
        """The end of what it printed since its start, for an error message."""
        return self._process.last_output()

    async def close(self) -> None:
        """End it and everything it started. May be called more than once."""
        await self._process.end()
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None

    def kill(self) -> None:
        """Send SIGKILL to the whole process group."""
        self._process.kill()

    def start_error(self) -> EngineStartError:
        """Return why a server ended before its first answer, as far as its log tells."""
        text = self._log_text()
        if f"No module named '{self.kind}'" in text:
            install = how_to_install(self.kind, "scoring")
            return EngineStartError(f"{self.engine} is not installed for {self._python}: {install}")
        tail = self._process.last_output()
        if memory := self._memory_message(text):
            return EngineStartError(memory + tail)
        if unknown := self.unknown.findall(tail):
            return EngineStartError(self._unknown_message(unknown[-1]))
        return EngineStartError(f"the {self.engine} server did not start{tail}")

    def _importable(self, scratch: Path) -> Sequence[Path]:
        """Write what the engine is to import into ``scratch``; return its folders."""
        return ()

    @abstractmethod
    def _options(self, port: int) -> Options:
        """Return the entries of the server's configuration file."""

    @abstractmethod
    def _variables(self) -> dict[str, str]:
        """Return the environment variables of the process, before those of the config."""

    @abstractmethod
    def _memory_message(self, text: str) -> str | None:
        """Return what was planned and what to change if the log says that memory ran out."""

    @property
    @abstractmethod
    def _server_arguments(self) -> Options:
        """Return the config's further options."""

    def _unknown_message(self, what: str) -> str:
        """Name the option, module or name that the engine lacks, and whose it is."""
        words = what.split()
        theirs = [name for name in self._server_arguments if f"--{name}" in words]
        if theirs:
            return (
                f"{self.engine} has no option {', '.join(theirs)} ({what}): see `python -m "
                f"{self.module} --help`, and change scoring.server_arguments"
            )
        return (
            f"the {self.engine} of {self._python} is a version that this does "
            f"not work with ({what}); use one of docs/engines/install.md"
        )

    def _port(self) -> int:
        """Return the config's port, or one that nobody else gets while the server runs.

        Raises:
            EngineStartError: the config's port is taken.
        """
        if self._settings.port:
            _check_free(self._settings.port, self.engine)
            return self._settings.port
        self._reserved = ReservedPort(HOST)
        return self._reserved.port

    def _log_text(self) -> str:
        try:
            with self._log.open("rb") as file:
                file.seek(max(self._log_start, self._log.stat().st_size - _LOG_SEARCH_BYTES))
                return file.read().decode(errors="replace")
        except OSError:
            return ""


async def unless_it_ends(server: EngineServer, work: Coroutine[Any, Any, None]) -> None:
    """Await ``work`` with a server that must not end meanwhile.

    Raises:
        EngineStartError: the server ended first.
    """
    ended = asyncio.ensure_future(server.wait())
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({working, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise server.start_error()
        await working
    finally:
        for task in (working, ended):
            task.cancel()
        await asyncio.gather(working, ended, return_exceptions=True)


def _check_free(port: int, engine: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise EngineStartError(
                f"port {port} is not available for the {engine} server ({error.strerror}); choose "
                "another scoring.port, or leave it out for a free one"
            ) from error
