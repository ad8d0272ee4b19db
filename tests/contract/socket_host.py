"""A fake of a host on another machine: a worker behind a TCP socket. Tests only.

`SocketHost` starts the far side, a server on 127.0.0.1, and talks to it over the socket alone. The
server runs a worker's module up to its call of `serve_worker`, and serves the same object to the
first connection that knows the token. A real host on another machine needs its own start, and a
transport that is more than pickles behind a token.
"""

import asyncio
import hmac
import json
import os
import runpy
import secrets
import sys
import tempfile
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

from qwen3_distill.errors import EngineLost, EngineStartError
from qwen3_distill.hosts import serve as serving
from qwen3_distill.hosts.child import ChildProcess, engine_environment
from qwen3_distill.hosts.connection import Connection
from qwen3_distill.hosts.host import WorkerSpec

ROOT = str(Path(__file__).parents[2])
TOKEN_BYTES = 32


class SocketHost:
    """A `Host` whose worker is on the far side of a TCP socket."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._server = ChildProcess(spec.name, spec.log)
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
        """Process group of the far side, for tests that strike it."""
        return self._server.pid

    async def start(self, environment: Mapping[str, str] | None = None) -> None:
        self._connection = None
        variables = {"PYTHONPATH": ROOT, **self._spec.environment, **(environment or {})}
        with tempfile.TemporaryDirectory() as folder:
            address = Path(folder) / "address"
            command = [
                self._spec.python,
                "-m",
                "tests.contract.socket_host",
                self._spec.module,
                str(address),
            ]
            await self._server.start(command, engine_environment(variables))
            try:
                where = await asyncio.wait_for(self._read(address), self._spec.start_timeout_s)
            except asyncio.TimeoutError:
                await self._server.end()
                raise EngineStartError(f"{self.name} did not start{self.last_output()}") from None
        reader, writer = await asyncio.open_connection("127.0.0.1", where["port"])
        writer.write(bytes.fromhex(where["token"]))
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
        await self._server.end(grace_s=15.0 if was_open else 0.0)
        if self._connection is not None:
            await self._connection.forget()

    def kill(self) -> None:
        self._server.kill()

    def output(self) -> str:
        return self._server.output()

    def last_output(self) -> str:
        return self._server.last_output()

    def _connected(self) -> Connection:
        if self._connection is None or (not self._is_open and self._connection.is_alive):
            raise EngineLost(f"{self.name} is not running: start it first")
        return self._connection

    async def _read(self, address: Path) -> dict[str, Any]:
        while not address.exists():
            if not self._server.is_running:
                raise EngineStartError(f"{self.name} did not start{self.last_output()}")
            await asyncio.sleep(0.02)
        return json.loads(address.read_text())

    async def _end_if_it_hangs(self, connection: Connection, hang_timeout_s: float) -> None:
        await connection.watch(hang_timeout_s)
        if connection.hangs:
            await self._server.end()


# --- The far side -------------------------------------------------------------------------------


async def listen(target: object, address: Path) -> None:
    """Serve ``target`` to one connection; its port and token are in the file ``address``."""
    token, over = secrets.token_bytes(TOKEN_BYTES), asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not hmac.compare_digest(await reader.readexactly(TOKEN_BYTES), token):
            writer.close()
            return
        try:
            await serving.serve(target, reader, writer)
        finally:
            over.set()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    unfinished = address.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"port": port, "token": token.hex()}))
    os.replace(unfinished, address)
    await over.wait()
    server.close()


def main(module: str, address: str) -> None:
    def listen_instead(target: object) -> None:
        asyncio.run(listen(target, Path(address)))

    serving.serve_worker = listen_instead
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
