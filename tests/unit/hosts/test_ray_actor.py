"""The actor of a `RayHost` by itself, without Ray: what it passes on, and what it does not read."""

import asyncio
import os
import pickle
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.hosts.frames import End, Error, Value
from qwen3_distill.hosts.host import WorkerSpec
from qwen3_distill.hosts.ray_host import _HostActor, _Kind


class ReadIn:
    """Becomes, where it is unpickled, the number of that process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.getpid, ()


@asynccontextmanager
async def started(tmp_path: Path) -> AsyncIterator[_HostActor]:
    spec = WorkerSpec(
        name="echo",
        python=sys.executable,
        module="tests.echo_worker",
        log=tmp_path / "log",
        start_timeout_s=60,
    )
    actor = _HostActor(spec, {}, str(tmp_path))
    try:
        assert await answers(actor, 0, "start", "start", {"GIVEN": "yes"}) == [Value(0, None)]
        yield actor
    finally:
        await actor.close()


async def answers(
    actor: _HostActor, call: int, kind: _Kind, method: str, *arguments: Any
) -> list[Value | End | Error]:
    """Make a call as `RayHost` does; return all of its answers."""
    found: list[Value | End | Error] = []
    reply = await actor.begin(call, kind, method, pickle.dumps(arguments), 60.0)
    while True:
        found += pickle.loads(reply)[0]
        if found and (kind != "stream" or not isinstance(found[-1], Value)):
            return found
        reply = await actor.poll(call)


@pytest.mark.parametrize("kind", ["call", "quiet"])
def test_arguments_are_read_by_the_worker_alone(tmp_path: Path, kind: _Kind) -> None:
    async def scenario() -> None:
        async with started(tmp_path) as actor:
            (worker,) = await answers(actor, 1, "call", "pid")
            (read_in,) = await answers(actor, 2, kind, "after", 0.0, ReadIn())
            assert isinstance(worker, Value)
            assert read_in == Value(2, worker.value)
            assert worker.value != os.getpid()
            assert await answers(actor, 3, "call", "variable", "GIVEN") == [Value(3, "yes")]

    asyncio.run(scenario())


def test_streams_and_errors_come_back_as_from_a_worker_of_this_machine(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with started(tmp_path) as actor:
            counted = await answers(actor, 1, "stream", "count", 3)
            assert counted == [Value(1, 0), Value(1, 1), Value(1, 2), End(1)]
            (unreadable,) = await answers(actor, 2, "call", "add", 1)
            assert isinstance(unreadable, Error)
            assert "TypeError" in str(unreadable.error)

    asyncio.run(scenario())
