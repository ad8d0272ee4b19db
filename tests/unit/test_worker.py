"""Worker processes: real ones, of a module that needs no engine."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qwen3_distill.errors import DataError, EngineError, EngineLost, EngineStartError
from qwen3_distill.utils.worker import WorkerProcess

Use = Callable[[WorkerProcess], Awaitable[None]]


@asynccontextmanager
async def started(log: Path, **changes: str) -> AsyncIterator[WorkerProcess]:
    root = str(Path(__file__).parents[2])
    worker = WorkerProcess(
        "echo",
        python=changes.get("python", sys.executable),
        module=changes.get("module", "tests.echo_worker"),
        log=log,
        environment={"PYTHONPATH": f"{root}/src:{root}", "ECHO_MARK": "set"},
    )
    try:
        await worker.start()
        yield worker
    finally:
        await worker.close()


def with_worker(log: Path, use: Use) -> None:
    async def run() -> None:
        async with started(log) as worker:
            await asyncio.wait_for(use(worker), 30)

    asyncio.run(run())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "echo.log"


def test_calls_and_streams_are_answered_side_by_side(log: Path) -> None:
    async def use(worker: WorkerProcess) -> None:
        slow = asyncio.create_task(worker.call("after", 0.3, "slow"))
        assert await worker.call("add", 2, 3) == 5
        assert [value async for value in worker.stream("count", 4)] == [0, 1, 2, 3]
        assert not slow.done()
        assert await slow == "slow"
        assert await worker.call("variable", "ECHO_MARK") == "set"

    with_worker(log, use)


def test_errors_of_this_package_keep_their_type_and_others_name_theirs(log: Path) -> None:
    async def use(worker: WorkerProcess) -> None:
        with pytest.raises(DataError, match="row 7"):
            await worker.call("known_error")
        with pytest.raises(EngineError, match=r"unknown_error: ZeroDivisionError: by hand"):
            await worker.call("unknown_error")
        assert await worker.call("add", 1, 1) == 2  # still alive

    with_worker(log, use)
    assert "ZeroDivisionError" in log.read_text()


def test_a_call_that_takes_too_long_is_named(log: Path) -> None:
    async def use(worker: WorkerProcess) -> None:
        with pytest.raises(EngineError, match=r"no answer to after within 0.1 s"):
            await worker.call("after", 20.0, "never", timeout_s=0.1)

    with_worker(log, use)


def test_a_death_fails_everything_that_waits_and_a_new_start_works(log: Path) -> None:
    async def use(worker: WorkerProcess) -> None:
        waiting = asyncio.create_task(worker.call("after", 60.0, "never"))
        await asyncio.sleep(0)
        with pytest.raises(EngineLost, match="last words"):
            await worker.call("die")
        with pytest.raises(EngineLost):
            await waiting
        with pytest.raises(EngineLost):
            await worker.call("add", 1, 1)
        assert not worker.is_running
        await worker.close()
        await worker.start()
        assert await worker.call("add", 1, 1) == 2

    with_worker(log, use)


def test_close_leaves_no_process(log: Path) -> None:
    async def use(worker: WorkerProcess) -> None:
        pid = await worker.call("pid")
        os.kill(pid, 0)  # there
        await worker.close()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        await worker.close()  # again is fine

    with_worker(log, use)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"python": "/nowhere/python"}, "/nowhere/python does not exist"),
        ({"module": "tests.no_such_module"}, "No module named"),
    ],
)
def test_a_worker_that_cannot_start_says_why(log: Path, changes, message) -> None:
    async def run() -> None:
        async with started(log, **changes):
            pytest.fail("started")

    with pytest.raises(EngineStartError, match=message):
        asyncio.run(run())
