"""Frames of another form end a worker with a cause, and no call waits for ever."""

import asyncio
import pickle
import struct
from typing import Any

import pytest

from qwen3_distill.errors import EngineLost
from qwen3_distill.hosts.connection import Connection
from qwen3_distill.hosts.frames import Call, Ping, Value, read_frame


def frame(payload: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(payload) if length is None else length) + payload


class _Explodes:
    def __reduce__(self) -> Any:
        return int, ("not a number \x1b[2J",)


@pytest.mark.parametrize(
    "sent",
    [
        frame(b"no pickle"),
        frame(b""),
        frame(pickle.dumps({"call": 0})),
        frame(pickle.dumps(None)),
        frame(pickle.dumps(_Explodes())),
        frame(b"cno_such_module\nthing\n."),
        frame(b"", 1 << 60),
        frame(pickle.dumps(Call(0, "x", ()))),
        frame(pickle.dumps(Ping(0))),
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_what_is_no_frame_fails_every_call(sent: bytes) -> None:
    left: asyncio.Event

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_frame(reader)
        writer.write(sent)
        await writer.drain()
        await reader.read()  # until the controller leaves
        writer.close()
        left.set()

    async def run() -> str:
        nonlocal left
        left = asyncio.Event()
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        connection = Connection("engine", reader, writer, last_output=lambda: "")
        with pytest.raises(EngineLost) as error:
            await asyncio.wait_for(
                connection.call("method", timeout_s=None, kill=lambda: None), timeout=10
            )
        assert not connection.is_alive
        connection.end()
        await connection.forget()
        await left.wait()
        server.close()
        return str(error.value)

    text = asyncio.run(run())
    assert "cannot be read" in text
    assert text.isprintable()


def test_a_frame_is_read() -> None:
    async def run() -> Any:
        reader = asyncio.StreamReader()
        reader.feed_data(frame(pickle.dumps(Value(3, "x"))))
        return await read_frame(reader)

    assert asyncio.run(run()) == Value(3, "x")
