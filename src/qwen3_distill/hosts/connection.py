"""The controller's side of one connection to a worker: calls, streams and the heartbeat."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from qwen3_distill.errors import DistillError, EngineError, EngineLost
from qwen3_distill.hosts.frames import (
    Call,
    Cancel,
    End,
    Error,
    FrameError,
    Ping,
    ToController,
    ToWorker,
    Value,
    read_frame,
    write_frame,
)
from qwen3_distill.utils.secrets import text_of_others

_TICKS = 10
"""Parts that the time for an answer is counted in."""
_DEATH_NOTICE_S = 5.0
"""Until the end of a connection that cannot be written to is seen by what reads from it."""


class Connection:
    """Calls that wait for a worker's answers; made in a running event loop.

    Args:
        name: names the worker in errors.
        last_output: the worker's last words, for the error of its death.
    """

    def __init__(
        self,
        name: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        last_output: Callable[[], str],
    ) -> None:
        self._name = name
        self._writer = writer
        self._last_output = last_output
        self._waiting: dict[int, asyncio.Queue[ToController | EngineLost]] = {}
        self._next_call = 0
        self._write_lock = asyncio.Lock()
        self._num_calls_without_heartbeat = 0
        self._hang: str | None = None
        self._death: EngineLost | None = None
        self._reading = asyncio.create_task(self._read(reader))

    @property
    def is_alive(self) -> bool:
        return self._death is None

    async def call(
        self, method: str, *arguments: Any, timeout_s: float | None, kill: Callable[[], None]
    ) -> Any:
        """See `Host.call`; ``kill`` ends a worker that does not answer in time."""
        call, answers = await self._send(Call(self._number(), method, arguments))
        try:
            answer = await _first_answer(answers, timeout_s)
        except asyncio.TimeoutError:
            kill()
            raise EngineLost(
                f"{self._name}: no answer to {method} within {timeout_s} s; it was killed"
            ) from None
        finally:
            self._waiting.pop(call, None)
        return self._value(answer)

    @contextlib.contextmanager
    def without_heartbeat(self) -> Iterator[None]:
        """In the block `watch` finds no hang."""
        self._num_calls_without_heartbeat += 1
        try:
            yield
        finally:
            self._num_calls_without_heartbeat -= 1

    async def stream(self, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        """See `Host.stream`."""
        call, answers = await self._send(Call(self._number(), method, arguments))
        ended = False
        try:
            while True:
                answer = await answers.get()
                ended = not isinstance(answer, Value)
                if isinstance(answer, End):
                    return
                yield self._value(answer)
        finally:
            self._waiting.pop(call, None)
            if not ended:
                await self._cancel(call)

    async def watch(self, hang_timeout_s: float) -> None:
        """Return when the worker's event loop has not answered for ``hang_timeout_s``, or is lost.

        The caller then ends the worker. Time is counted in ticks of this event loop: what kept it
        from reading an answer (a long step of an engine in this process, a laptop's sleep) is one
        tick, however long it was.
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
                    return
            finally:
                answer.cancel()
            await asyncio.sleep(tick_s)

    @property
    def hangs(self) -> bool:
        """Whether `watch` found a hang."""
        return self._hang is not None

    def end(self) -> None:
        """Close the connection: the worker's sign to leave."""
        self._writer.close()

    async def forget(self) -> None:
        """Stop reading, once the worker has ended."""
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading

    def _number(self) -> int:
        self._next_call += 1
        return self._next_call - 1

    async def _send(
        self, frame: Call | Ping
    ) -> tuple[int, asyncio.Queue[ToController | EngineLost]]:
        if self._death is not None:
            raise self._death
        answers = self._waiting[frame.call] = asyncio.Queue()
        try:
            await self._write(frame)
        except (ConnectionError, OSError) as error:
            self._waiting.pop(frame.call, None)
            await asyncio.wait({self._reading}, timeout=_DEATH_NOTICE_S)  # it says how it ended
            lost = EngineLost(f"{self._name} closed its connection: {error}")
            raise (self._death or lost) from error
        return frame.call, answers

    async def _write(self, frame: ToWorker) -> None:
        async with self._write_lock:
            await write_frame(self._writer, frame)

    async def _cancel(self, call: int) -> None:
        with contextlib.suppress(ConnectionError, OSError):
            if self._death is None and not self._writer.is_closing():
                await self._write(Cancel(call))

    async def _ping(self) -> None:
        with contextlib.suppress(EngineLost):  # `_read` deals with that
            call, answers = await self._send(Ping(self._number()))
            try:
                await answers.get()
            finally:
                self._waiting.pop(call, None)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Hand answers to the calls that wait; when the connection ends, fail them all."""
        what = "died"
        try:
            while True:
                frame = await read_frame(reader)
                if not isinstance(frame, Value | End | Error):
                    raise FrameError(f"a {type(frame).__name__} from a worker")
                if frame.call in self._waiting:
                    self._waiting[frame.call].put_nowait(frame)
        except FrameError as error:
            what = f"sent what cannot be read ({text_of_others(str(error))})"
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        what = self._hang or what
        self._death = EngineLost(f"{self._name} {what}{self._last_output()}")
        for answers in self._waiting.values():
            answers.put_nowait(self._death)

    def _value(self, answer: ToController | EngineLost) -> Any:
        match answer:
            case Value(_, value):
                return value
            case Error(_, DistillError() as error):
                raise error
            case Error(_, text):
                raise EngineError(f"{self._name}: {text}")
            case EngineLost():
                raise answer
            case End():
                raise EngineError(f"{self._name}: a generator was called as a method")


async def _first_answer(
    answers: "asyncio.Queue[ToController | EngineLost]", timeout_s: float | None
) -> ToController | EngineLost:
    """Wait for the first answer; the limit is counted in ticks (see `Connection.watch`)."""
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
