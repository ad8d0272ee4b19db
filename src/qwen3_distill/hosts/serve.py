"""The worker's side: an object's public methods, served over one connection.

`serve_worker` is called by a small module that imports its engine there and nowhere else.
"""

import asyncio
import contextlib
import functools
import inspect
import sys
import traceback
from typing import Any

from qwen3_distill.errors import DistillError
from qwen3_distill.hosts.frames import (
    Call,
    Cancel,
    End,
    Error,
    Ping,
    ToController,
    Value,
    read_frame,
    unpacked,
    write_frame,
)


def serve_worker(target: object) -> None:
    """Serve ``target`` over the Unix socket that is this program's first argument; see `serve`.

    When the controller closes the connection, the target's ``shutdown``, if it has one, is called
    (and awaited), and this returns. The guard kills this process when the controller dies.
    """
    asyncio.run(_connect_and_serve(target, sys.argv[1]))


async def serve(target: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve ``target``'s public methods until the controller closes the connection.

    Asynchronous methods run concurrently; a synchronous one blocks all others. The target's
    ``shutdown``, if it has one, is called (and awaited) at the end.
    """
    await _Service(target, reader, writer).run()


async def _connect_and_serve(target: object, socket: str) -> None:
    await serve(target, *await asyncio.open_unix_connection(socket))


class _Service:
    def __init__(
        self, target: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._target = target
        self._reader, self._writer = reader, writer
        self._write_lock = asyncio.Lock()
        self._running: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                await self._take(await read_frame(self._reader))
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        shutdown = getattr(self._target, "shutdown", None)
        if shutdown is not None:
            left = shutdown()
            if inspect.isawaitable(left):
                await left

    async def _take(self, frame: Any) -> None:
        match frame:
            case Cancel(call):
                if call in self._running:
                    self._running[call].cancel()
            case Ping(call):
                await self._send(Value(call, None))
            case Call(call):
                task = asyncio.create_task(self._answer(frame))
                self._running[call] = task
                task.add_done_callback(functools.partial(self._forget, call=call))
            case _:
                raise TypeError(f"a worker was sent {type(frame).__name__}")

    def _forget(self, task: asyncio.Task[None], call: int) -> None:
        self._running.pop(call, None)

    async def _send(self, frame: ToController) -> None:
        async with self._write_lock:
            await write_frame(self._writer, frame)

    async def _answer(self, frame: Call) -> None:
        call, method = frame.call, frame.method
        try:
            result = getattr(self._target, method)(*unpacked(frame.arguments))
            if inspect.isasyncgen(result):
                # A cancelled call ends its generator at once.
                async with contextlib.aclosing(result):
                    async for item in result:
                        await self._send(Value(call, item))
                await self._send(End(call))
            else:
                value = await result if inspect.isawaitable(result) else result
                await self._send(Value(call, value))
        except DistillError as error:
            await self._send(Error(call, error))
        except Exception as error:  # noqa: BLE001 - the boundary: every failure becomes an answer
            traceback.print_exc()  # whole in the worker's log
            await self._send(Error(call, f"{method}: {type(error).__name__}: {error}"))
