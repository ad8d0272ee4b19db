"""What the client reads of a connection: bounded in size and time, and never unpacked."""

import asyncio
import contextlib
import gzip
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from qwen3_distill.errors import ConfigError, EngineError
from qwen3_distill.scoring.served.client import ServerClient
from qwen3_distill.scoring.served.faults import FaultKind, Refused, Unanswered
from qwen3_distill.scoring.served.key import read_api_key

KEY = "sk-0123456789abcdef-only-for-tests"
Writes = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def ask(writes: Writes, *, max_bytes: int = 1000, timeout_s: float = 1.0, user: str = "") -> bytes:
    """Send one request to a server that answers by ``writes``."""

    async def run() -> bytes:
        server = await asyncio.start_server(writes, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        key = None if user else KEY
        client = ServerClient(
            [f"http://{user}{host}:{port}"],
            path="/generate",
            api_key=key,
            max_in_flight=1,
            timeout_s=timeout_s,
        )
        try:
            return await client.post(b"{}", tokens=1, max_bytes=max_bytes)
        finally:
            await client.close()
            server.close()

    return asyncio.run(run())


def says(body: bytes, *headers: str, status: str = "200 OK") -> Writes:
    async def write(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    return write


def fault_of(writes: Writes, *, max_bytes: int = 1000, timeout_s: float = 1.0) -> Unanswered:
    with pytest.raises(Unanswered) as error:
        ask(writes, max_bytes=max_bytes, timeout_s=timeout_s)
    return error.value


def test_a_reply_within_the_limit_is_returned() -> None:
    assert ask(says(b"x" * 1000)) == b"x" * 1000


def test_a_larger_reply_is_not_read() -> None:
    assert fault_of(says(b"x" * 1001)).fault.kind is FaultKind.GARBAGE


def test_reading_ends_at_the_limit() -> None:
    written = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            while not writer.is_closing():
                writer.write(b" " * 65536)
                written += 65536
                await writer.drain()

    assert "bytes" in str(fault_of(endless))
    assert written < 32 << 20  # what the sockets hold


def test_a_compressed_reply_is_not_unpacked() -> None:
    bomb = gzip.compress(b" " * (64 << 20))
    fault = fault_of(says(bomb, "Content-Encoding: gzip"), max_bytes=len(bomb)).fault
    assert (fault.kind, "compressed" in fault.detail) == (FaultKind.GARBAGE, True)


def test_no_compression_is_asked_for() -> None:
    heads: list[bytes] = []

    async def write(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")
        writer.close()

    ask(write)
    assert b"accept-encoding: identity" in heads[0].lower()


@pytest.mark.parametrize("in_head", [True, False])
def test_a_byte_now_and_then_does_not_outlive_the_deadline(in_head: bool) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n" + (b"" if in_head else b"Content-Length: 99\r\n\r\n"))
        with contextlib.closing(writer):
            while not writer.is_closing():
                writer.write(b"X: y\r\n" if in_head else b" ")
                await asyncio.sleep(0.05)

    began = time.monotonic()
    assert fault_of(drip, timeout_s=0.3).fault.kind is FaultKind.TIMEOUT
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("status", ["400 X", "401 X", "500 X", "302 X"])
@pytest.mark.parametrize("filler", [0, 290, 599])
def test_no_error_shows_the_key_that_a_server_sends_back(status: str, filler: int) -> None:
    with pytest.raises((Unanswered, Refused, EngineError)) as error:
        ask(says(b"x" * filler + f" \x1b[2J{KEY}".encode(), status=status))
    text = str(error.value)
    assert all(KEY[at : at + 8] not in text for at in range(len(KEY) - 7))
    assert text.isprintable()


def test_no_error_shows_the_password_of_an_address() -> None:
    with pytest.raises(Unanswered) as error:
        ask(says(b"s3cretpass", status="500 X"), user="me:s3cretpass@")
    assert "s3cret" not in str(error.value)


def key_file(folder: Path, content: bytes) -> str:
    (folder / "key").write_bytes(content)
    return str(folder / "key")


@pytest.mark.parametrize("content", [KEY.encode(), f"\n {KEY}\r\n\n".encode()])
def test_a_key_is_read_without_blanks_around_it(tmp_path: Path, content: bytes) -> None:
    assert read_api_key(key_file(tmp_path, content)) == KEY


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\n \n", b"secret-1\nsecret-2", b"secret-1\x1b[2J", b"secret-1\x00x", b"secret 1"),
        *("secret-é".encode(), b"secret-\xff", b"secret" * 5000, "\ufeffsecret".encode()),
        *(b"secret-1\rsecret-2", b"secret\x0b1", "secret\u20281".encode()),
    ],
)
def test_a_bad_key_is_refused_and_not_shown(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match=r"scoring\.api_key_file") as error:
        read_api_key(key_file(tmp_path, content))
    assert "secret" not in str(error.value)
    assert str(error.value).isprintable()


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_api_key(str(path))
