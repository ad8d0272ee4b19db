"""A host on this machine: the worker is a process of its own, reached over a Unix socket.

The socket lies among the process's temporary files, in a folder that only this user can enter.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from qwen3_distill.errors import EngineLost, EngineStartError
from qwen3_distill.hosts.child import ChildProcess, engine_environment
from qwen3_distill.hosts.connection import Connection
from qwen3_distill.hosts.host import WorkerSpec

_SHUTDOWN_GRACE_S = 15.0


class LocalProcess:
    """A `Host` that runs its worker as a process of this machine."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._process = ChildProcess(spec.name, spec.log, spec.remove)
        self._connection: Connection | None = None
        self._is_open = False
        self._watching: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def is_running(self) -> bool:
        return self._is_open and self._connection is not None and self._connection.is_alive

    @property
    def pid(self) -> int | None:
        """Leader of the process group that holds the worker."""
        return self._process.pid

    async def start(self, environment: Mapping[str, str] | None = None) -> None:
        self._connection = None
        connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        connected = asyncio.get_running_loop().create_future()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if not connected.done():
                connected.set_result((reader, writer))

        socket = self._process.scratch / "controller"
        server = await asyncio.start_unix_server(accept, socket)
        variables = {**self._spec.environment, **(environment or {})}
        try:
            command = [self._spec.python, "-m", self._spec.module, str(socket)]
            await self._process.start(command, engine_environment(variables))
            reader, writer = await self._first(connected)
        finally:
            server.close()
            socket.unlink(missing_ok=True)
        self._connection = Connection(self.name, reader, writer, last_output=self.last_output)
        self._is_open = True
        if self._spec.hang_timeout_s is not None:
            self._watching = asyncio.create_task(
                self._end_if_it_hangs(self._connection, self._spec.hang_timeout_s)
            )

    async def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        return await self._connected().call(method, *arguments, timeout_s=timeout_s, kill=self.kill)

    async def call_without_heartbeat(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        with self._connected().without_heartbeat():
            return await self.call(method, *arguments, timeout_s=timeout_s)

    async def stream(self, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        stream = self._connected().stream(method, *arguments)
        try:
            async for value in stream:
                yield value
        finally:
            await stream.aclose()

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        was_open, self._is_open = self._is_open, False
        if was_open and self._connection is not None:
            self._connection.end()
        await self._process.end(grace_s=_SHUTDOWN_GRACE_S if was_open else 0.0)
        if self._connection is not None:
            await self._connection.forget()

    def kill(self) -> None:
        self._process.kill()

    def output(self) -> str:
        return self._process.output()

    def last_output(self) -> str:
        return self._process.last_output()

    def _connected(self) -> Connection:
        if self._connection is None or (not self._is_open and self._connection.is_alive):
            raise EngineLost(f"{self.name} is not running: start it first")
        return self._connection

    async def _first(
        self, connected: "asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]"
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the connection, unless the process ends before there is one."""
        ended = asyncio.create_task(self._process.wait())
        done, _ = await asyncio.wait(
            {connected, ended},
            timeout=self._spec.start_timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        ended.cancel()
        if connected in done:
            return connected.result()
        within = "" if ended in done else f" within {self._spec.start_timeout_s:g} s"
        await self._process.end()
        raise EngineStartError(f"{self.name} did not start{within}{self._process.last_output()}")

    async def _end_if_it_hangs(self, connection: Connection, hang_timeout_s: float) -> None:
        await connection.watch(hang_timeout_s)
        if connection.hangs:
            await self._process.end()
