"""An object in a process of its own, under its own interpreter, reached over a local socket.

The controller's side is `WorkerProcess`: it starts the process, calls methods, reads streams, and
knows when the process has died or hangs. The worker's side is `serve_worker`, run by a small module
that imports its engine there and nowhere else.

Frames are pickles over a Unix socket in a directory that only this user can enter. Both sides are
this package, so records (numpy only) cross unchanged; no engine's types ever do.
"""

import asyncio
import contextlib
import functools
import inspect
import pickle
import shutil
import struct
import sys
import tempfile
import traceback
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_distill.errors import DistillError, EngineError, EngineLost, EngineStartError
from qwen3_distill.hosts.child import ChildProcess, engine_environment

_LENGTH = struct.Struct("<Q")
_SHUTDOWN_GRACE_S = 15.0
_CANCEL = ""
"""In place of a method's name: end the call of that number."""
_PING = "?"
"""In place of a method's name: the worker's event loop answers by itself."""
_TICKS = 10
"""Parts that the time for an answer is counted in."""


class WorkerProcess:
    """A worker and the calls that wait for it.

    Args:
        name: names the worker in errors and its log file.
        python: interpreter of the worker's own environment.
        module: module that calls `serve_worker` when run with ``-m``.
        log: file that takes the worker's output; appended to.
        environment: variables set for the worker, beside those of this process.
        hang_timeout_s: a worker whose event loop does not answer for so long is killed, and lost
            like one that died; None: it is waited for. Longer than the longest method that
            blocks the loop.
        start_timeout_s: until it connects, which is after its module's imports.
    """

    def __init__(
        self,
        name: str,
        *,
        python: str,
        module: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        hang_timeout_s: float | None = None,
        start_timeout_s: float = 120.0,
    ) -> None:
        self.name = name
        self._start_timeout_s = start_timeout_s
        self._python = python
        self._module = module
        self._environment = dict(environment or {})
        self._hang_timeout_s = hang_timeout_s
        self._process = ChildProcess(name, log)
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._watch_task: asyncio.Task[None] | None = None
        self._hang: str | None = None
        self._num_calls_without_heartbeat = 0
        self._waiting: dict[int, asyncio.Queue[tuple[str, Any]]] = {}
        self._next_call = 0
        self._write_lock = asyncio.Lock()
        self._death: EngineLost | None = None

    @property
    def is_running(self) -> bool:
        return self._writer is not None and self._death is None

    @property
    def pid(self) -> int | None:
        """Leader of the process group that holds the worker."""
        return self._process.pid

    async def start(self) -> None:
        """Start the process and connect.

        Raises:
            EngineStartError: it ended before it connected, or did not connect in time; the message
                has its last output.
        """
        self._death = self._hang = None
        directory = Path(tempfile.mkdtemp(prefix="qwen3-distill-"))
        connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        connected = asyncio.get_running_loop().create_future()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if not connected.done():
                connected.set_result((reader, writer))

        socket = directory / "socket"
        server = await asyncio.start_unix_server(accept, socket)
        try:
            command = [self._python, "-m", self._module, str(socket)]
            await self._process.start(command, engine_environment(self._environment))
            reader, self._writer = await self._first(connected)
        finally:
            server.close()
            shutil.rmtree(directory, ignore_errors=True)
        self._reader_task = asyncio.create_task(self._read(reader))
        if self._hang_timeout_s is not None:
            self._watch_task = asyncio.create_task(self._watch(self._hang_timeout_s))

    async def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """Call a method of the worker's object and wait for what it returns.

        Raises:
            EngineLost: the process died before it answered, or hung, or did not answer within
                ``timeout_s`` and was killed.
            EngineError: the method raised.
        """
        call, answers = await self._send(method, arguments)
        try:
            kind, value = await _first_answer(answers, timeout_s)
        except asyncio.TimeoutError:
            self.kill()
            raise EngineLost(
                f"{self.name}: no answer to {method} within {timeout_s} s; it was killed"
            ) from None
        finally:
            self._waiting.pop(call, None)
        return self._unwrap(kind, value)

    async def call_without_heartbeat(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """`call` of a method that may block the worker for all of ``timeout_s``: no hang till then.

        For an engine's start, which has a limit of its own.
        """
        self._num_calls_without_heartbeat += 1
        try:
            return await self.call(method, *arguments, timeout_s=timeout_s)
        finally:
            self._num_calls_without_heartbeat -= 1

    async def stream(self, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        """Call an asynchronous generator of the worker's object and yield what it yields.

        Left early, the generator is cancelled over there too.
        """
        call, answers = await self._send(method, arguments)
        ended = False
        try:
            while True:
                kind, value = await answers.get()
                ended = kind != "value"
                if kind == "end":
                    return
                yield self._unwrap(kind, value)
        finally:
            self._waiting.pop(call, None)
            if not ended:
                await self._cancel(call)

    async def _cancel(self, call: int) -> None:
        with contextlib.suppress(ConnectionError, OSError):
            if self._writer is not None and self._death is None:
                async with self._write_lock:
                    await _write_frame(self._writer, (call, _CANCEL, ()))

    async def close(self) -> None:
        """End the process and everything it started. May be called more than once."""
        if self._watch_task is not None:
            self._watch_task.cancel()
            self._watch_task = None
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()  # the worker's sign to leave
        await self._process.end(grace_s=_SHUTDOWN_GRACE_S if writer is not None else 0.0)
        if self._reader_task is not None:
            self._reader_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader_task
            self._reader_task = None

    def kill(self) -> None:
        """SIGKILL the whole group at once; for a worker that hangs, and for tests."""
        self._process.kill()

    def output(self) -> str:
        """What the process printed since its start, or the end of it."""
        return self._process.output()

    def last_output(self) -> str:
        """Its end, to be put after an error message."""
        return self._process.last_output()

    async def _first(
        self, connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The connection, unless the process ends before there is one."""
        ended = asyncio.create_task(self._process.wait())
        done, _ = await asyncio.wait(
            {connected, ended},
            timeout=self._start_timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if connected in done:
            ended.cancel()
            return connected.result()
        ended.cancel()
        within = "" if ended in done else f" within {self._start_timeout_s:g} s"
        await self._process.end()
        raise EngineStartError(f"{self.name} did not start{within}{self._process.last_output()}")

    async def _send(
        self, method: str, arguments: Sequence[Any]
    ) -> tuple[int, asyncio.Queue[tuple[str, Any]]]:
        if self._death is not None:
            raise self._death
        if self._writer is None:
            raise EngineLost(f"{self.name} is not running: start it first")
        call = self._next_call
        self._next_call += 1
        answers = self._waiting[call] = asyncio.Queue()
        try:
            async with self._write_lock:
                await _write_frame(self._writer, (call, method, tuple(arguments)))
        except (ConnectionError, OSError) as error:
            self._waiting.pop(call, None)
            raise EngineLost(f"{self.name} closed its connection: {error}") from error
        return call, answers

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Deal answers to those who wait; when the connection ends, fail them all."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                call, kind, value = await _read_frame(reader)
                if call in self._waiting:
                    self._waiting[call].put_nowait((kind, value))
        what = self._hang or "died"
        self._death = EngineLost(f"{self.name} {what}{self._process.last_output()}")
        for answers in self._waiting.values():
            answers.put_nowait(("died", self._death))

    async def _watch(self, hang_timeout_s: float) -> None:
        """Kill a worker whose event loop does not answer; the reader tells those who wait.

        Time is counted in ticks of this event loop: what kept it from reading an answer (a long
        step of an engine in this process, a laptop's sleep) is one tick, however long it was.
        """
        tick_s = hang_timeout_s / _TICKS
        while self._death is None:
            answer = asyncio.create_task(self._ping())
            try:
                silent_ticks = 0
                while not answer.done() and silent_ticks < _TICKS:
                    await asyncio.wait({answer}, timeout=tick_s)
                    silent_ticks = 0 if self._num_calls_without_heartbeat else silent_ticks + 1
                if not answer.done():
                    self._hang = f"did not answer for {hang_timeout_s:g} s and was killed"
                    await self._process.end()
                    return
            finally:
                answer.cancel()
            await asyncio.sleep(tick_s)

    async def _ping(self) -> None:
        with contextlib.suppress(EngineLost):  # the reader deals with that
            await self.call(_PING)

    def _unwrap(self, kind: str, value: Any) -> Any:
        if kind == "value":
            return value
        if kind == "died":
            raise value
        if isinstance(value, DistillError):
            raise value
        raise EngineError(f"{self.name}: {value}")


async def _first_answer(
    answers: asyncio.Queue[tuple[str, Any]], timeout_s: float | None
) -> tuple[str, Any]:
    """What comes first, within a time that is counted in ticks (see `WorkerProcess._watch`)."""
    if timeout_s is None:
        return await answers.get()
    answer = asyncio.ensure_future(answers.get())
    try:
        for _ in range(_TICKS):
            if (await asyncio.wait({answer}, timeout=timeout_s / _TICKS))[0]:
                return answer.result()
        raise asyncio.TimeoutError
    finally:
        answer.cancel()


def serve_worker(target: object) -> None:
    """Serve ``target``'s public methods to the controller that started this process.

    Ends when the controller closes the connection; the guard kills it when the controller dies.
    Asynchronous methods run side by side; a synchronous one blocks all others. ``shutdown``, where
    there is one, is called (and awaited) at the end.
    """
    asyncio.run(_serve(target, sys.argv[1]))


async def _serve(target: object, socket: str) -> None:
    reader, writer = await asyncio.open_unix_connection(socket)
    lock = asyncio.Lock()
    running: dict[int, asyncio.Task[None]] = {}

    def forget(task: asyncio.Task[None], call: int) -> None:
        running.pop(call, None)

    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            call, method, arguments = await _read_frame(reader)
            if method == _CANCEL:
                if call in running:
                    running[call].cancel()
                continue
            if method == _PING:
                async with lock:
                    await _write_frame(writer, (call, "value", None))
                continue
            task = asyncio.create_task(_answer(target, writer, lock, call, method, arguments))
            running[call] = task
            task.add_done_callback(functools.partial(forget, call=call))
    tasks = list(running.values())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    shutdown = getattr(target, "shutdown", None)
    if shutdown is not None:
        left = shutdown()
        if inspect.isawaitable(left):
            await left


async def _answer(
    target: object,
    writer: asyncio.StreamWriter,
    lock: asyncio.Lock,
    call: int,
    method: str,
    arguments: tuple[Any, ...],
) -> None:
    async def send(kind: str, value: Any) -> None:
        async with lock:
            await _write_frame(writer, (call, kind, value))

    try:
        result = getattr(target, method)(*arguments)
        if inspect.isasyncgen(result):
            async with contextlib.aclosing(result):  # a cancelled call ends its generator at once
                async for item in result:
                    await send("value", item)
            await send("end", None)
        else:
            await send("value", await result if inspect.isawaitable(result) else result)
    except DistillError as error:
        await send("error", error)
    except Exception as error:  # noqa: BLE001 - the boundary: every failure becomes an answer
        traceback.print_exc()  # whole in the worker's log
        await send("error", f"{method}: {type(error).__name__}: {error}")


async def _write_frame(writer: asyncio.StreamWriter, value: Any) -> None:
    payload = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    writer.write(_LENGTH.pack(len(payload)))
    writer.write(payload)
    await writer.drain()


async def _read_frame(reader: asyncio.StreamReader) -> Any:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(length))
