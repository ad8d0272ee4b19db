"""A reserved port goes to the server that it is meant for, and to nobody else."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import TCPStore

from qwen3_distill.errors import EngineStartError
from qwen3_distill.hosts.reserved_port import ReservedPort

HOST = "127.0.0.1"


@pytest.fixture
def reserved() -> Iterator[ReservedPort]:
    with closing(ReservedPort(HOST)) as port:
        yield port


def bind(port: int, *, shares: bool) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(shares))
        other.bind((HOST, port))


def test_a_program_that_shares_no_port_cannot_take_it(reserved: ReservedPort) -> None:
    with pytest.raises(OSError, match="in use"):
        bind(reserved.port, shares=False)
    reserved.close()
    reserved.close()
    bind(reserved.port, shares=False)


def test_a_server_that_comes_later_listens_at_it(reserved: ReservedPort) -> None:
    async def served() -> bytes:
        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"here")
            writer.close()

        server = await asyncio.start_server(answer, HOST, reserved.port)
        async with server:
            reader, writer = await asyncio.open_connection(HOST, reserved.port)
            found = await reader.read()
            writer.close()
        return found

    assert asyncio.run(served()) == b"here"


@pytest.mark.parametrize("use_libuv", [True, False])
def test_the_ranks_of_a_group_meet_at_it(reserved: ReservedPort, use_libuv: bool) -> None:
    limit = timedelta(seconds=10)
    first = TCPStore(HOST, reserved.port, 1, True, limit, use_libuv=use_libuv)
    first.set("rank 0", "here")
    other = TCPStore(HOST, reserved.port, None, False, limit, use_libuv=use_libuv)
    assert other.get("rank 0") == b"here"


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(EngineStartError, match=r"192\.0\.2\.1, which should be an address of this"):
        ReservedPort("192.0.2.1")
