"""Worker processes: real ones, of a module that needs no engine."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qwen3_distill.errors import DataError, EngineError, EngineLost, EngineStartError
from qwen3_distill.hosts.child import ChildProcess, engine_environment, short_temporary_dir
from qwen3_distill.hosts.host import WorkerSpec
from qwen3_distill.hosts.process import LocalProcess

Use = Callable[[LocalProcess], Awaitable[None]]


@asynccontextmanager
async def started(
    log: Path, *, hang_timeout_s: float | None = None, **changes: str
) -> AsyncIterator[LocalProcess]:
    root = str(Path(__file__).parents[3])
    worker = LocalProcess(
        WorkerSpec(
            name="echo",
            python=changes.get("python", sys.executable),
            module=changes.get("module", "tests.echo_worker"),
            log=log,
            environment={"PYTHONPATH": f"{root}/src:{root}", "ECHO_MARK": "set"},
            hang_timeout_s=hang_timeout_s,
        )
    )
    try:
        await worker.start()
        yield worker
    finally:
        await worker.close()


def with_worker(log: Path, use: Use, *, hang_timeout_s: float | None = None) -> None:
    async def run() -> None:
        async with started(log, hang_timeout_s=hang_timeout_s) as worker:
            await asyncio.wait_for(use(worker), 30)

    asyncio.run(run())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "echo.log"


def test_calls_and_streams_are_answered_side_by_side(log: Path) -> None:
    async def use(worker: LocalProcess) -> None:
        slow = asyncio.create_task(worker.call("after", 0.3, "slow"))
        assert await worker.call("add", 2, 3) == 5
        assert [value async for value in worker.stream("count", 4)] == [0, 1, 2, 3]
        assert not slow.done()
        assert await slow == "slow"
        assert await worker.call("variable", "ECHO_MARK") == "set"

    with_worker(log, use)


def test_variables_of_one_start_come_on_top_of_the_worker_s_own(log: Path) -> None:
    async def use(worker: LocalProcess) -> None:
        await worker.close()
        await worker.start({"ECHO_MARK": "of this start"})
        assert await worker.call("variable", "ECHO_MARK") == "of this start"
        await worker.close()
        await worker.start()
        assert await worker.call("variable", "ECHO_MARK") == "set"

    with_worker(log, use)


@pytest.mark.parametrize("method", ["", "?"])
def test_a_method_s_name_is_nothing_but_a_name(log: Path, method: str) -> None:
    """Pings and cancellations are frames of their own kinds."""

    async def use(worker: LocalProcess) -> None:
        with pytest.raises(EngineError, match="AttributeError"):
            await worker.call(method)

    with_worker(log, use)


def test_errors_of_this_package_keep_their_type_and_others_name_theirs(log: Path) -> None:
    async def use(worker: LocalProcess) -> None:
        with pytest.raises(DataError, match="row 7"):
            await worker.call("known_error")
        with pytest.raises(EngineError, match=r"unknown_error: ZeroDivisionError: by hand"):
            await worker.call("unknown_error")
        assert await worker.call("add", 1, 1) == 2  # still alive

    with_worker(log, use)
    assert "ZeroDivisionError" in log.read_text()


def test_a_call_that_takes_too_long_is_named(log: Path) -> None:
    async def use(worker: LocalProcess) -> None:
        with pytest.raises(EngineError, match=r"no answer to after within 0.1 s"):
            await worker.call("after", 20.0, "never", timeout_s=0.1)

    with_worker(log, use)


def test_a_death_fails_everything_that_waits_and_a_new_start_works(log: Path) -> None:
    async def use(worker: LocalProcess) -> None:
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
    async def use(worker: LocalProcess) -> None:
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


def test_a_stream_left_early_is_cancelled_over_there(log: Path) -> None:
    async def use(worker: LocalProcess) -> None:
        stream = worker.stream("ticks")
        assert await anext(stream) == 0
        assert await worker.call("num_ticking") == 1
        await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue] - a generator
        for _ in range(100):
            if await worker.call("num_ticking") == 0:
                return
            await asyncio.sleep(0.02)
        pytest.fail("still ticking")

    with_worker(log, use)


# --- Hangs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["worker", "group"])
def test_a_stopped_worker_is_killed_and_lost_and_a_new_start_works(log: Path, what: str) -> None:
    async def use(worker: LocalProcess) -> None:
        pid = await worker.call("pid")
        stream = worker.stream("ticks")
        await anext(stream)
        calling = asyncio.create_task(worker.call("after", 60.0, "never"))
        await asyncio.sleep(0)
        if what == "group":  # with the guard that could have killed it
            assert worker.pid is not None
            os.killpg(worker.pid, signal.SIGSTOP)
        else:
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EngineLost, match=r"echo did not answer for 1 s and was killed"):
            await calling
        with pytest.raises(EngineLost, match="did not answer"):
            async for _ in stream:
                pass
        assert all_gone([pid])
        await worker.close()
        await worker.start()
        assert await worker.call("add", 1, 1) == 2

    with_worker(log, use, hang_timeout_s=1.0)


def test_a_call_to_a_dead_worker_says_how_it_died_also_if_it_cannot_be_written(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(worker: LocalProcess) -> None:
        async def write(frame: object) -> None:
            worker.kill()
            raise ConnectionResetError("Connection lost")

        monkeypatch.setattr(worker._connected(), "_write", write)
        with pytest.raises(EngineLost, match="echo died"):
            await worker.call("add", 1, 1)

    with_worker(log, use)


def test_a_large_message_to_a_stopped_worker_does_not_hide_the_hang(log: Path) -> None:
    async def use(worker: LocalProcess) -> None:
        os.kill(await worker.call("pid"), signal.SIGSTOP)
        with pytest.raises(EngineLost):
            await worker.call("size", bytes(1 << 24))

    with_worker(log, use, hang_timeout_s=1.0)


def test_a_stuck_event_loop_is_a_hang(log: Path) -> None:
    async def use(worker: LocalProcess) -> None:
        with pytest.raises(EngineLost, match="did not answer for 1 s"):
            await worker.call("block", 60.0)

    with_worker(log, use, hang_timeout_s=1.0)


def test_a_worker_that_blocks_for_less_than_the_limit_lives(log: Path) -> None:
    async def use(worker: LocalProcess) -> None:
        for _ in range(3):
            assert await worker.call("block", 1.5) == "done"

    with_worker(log, use, hang_timeout_s=4.0)


def test_a_silent_call_has_its_own_limit(log: Path) -> None:
    async def use(worker: LocalProcess) -> None:
        assert await worker.call_without_heartbeat("block", 3.0, timeout_s=20.0) == "done"
        with pytest.raises(EngineLost, match="did not answer"):  # watched again
            await worker.call("block", 60.0)

    with_worker(log, use, hang_timeout_s=1.0)


def test_a_controller_that_was_busy_does_not_take_its_worker_for_dead(log: Path) -> None:
    async def use(worker: LocalProcess) -> None:
        for _ in range(4):
            time.sleep(1.5)
            assert await worker.call("add", 1, 1) == 2

    with_worker(log, use, hang_timeout_s=1.0)


def test_an_answer_that_is_there_counts_though_the_controller_was_busy_for_longer(
    log: Path,
) -> None:
    async def use(worker: LocalProcess) -> None:
        call = asyncio.create_task(worker.call("after", 0.1, "x", timeout_s=1))
        await asyncio.sleep(0.05)
        time.sleep(1.5)
        assert await call == "x"

    with_worker(log, use)


def test_a_worker_that_does_not_connect_in_time_is_named(log: Path, tmp_path: Path) -> None:
    sleeps = tmp_path / "sleeps"
    sleeps.write_text("#!/bin/sh\nsleep 60\n")
    sleeps.chmod(0o755)
    spec = WorkerSpec(name="echo", python=str(sleeps), module="any", log=log, start_timeout_s=0.5)
    worker = LocalProcess(spec)
    with pytest.raises(EngineStartError, match=r"echo did not start within 0\.5 s"):
        asyncio.run(worker.start())


def test_no_time_limit_means_no_watch(log: Path) -> None:
    async def use(worker: LocalProcess) -> None:
        pid = await worker.call("pid")
        os.kill(pid, signal.SIGSTOP)
        waiting = asyncio.create_task(worker.call("add", 2, 3))
        await asyncio.sleep(1.5)
        os.kill(pid, signal.SIGCONT)
        assert await waiting == 5

    with_worker(log, use)


# --- Nothing outlives its controller ------------------------------------------------------------

FAMILY = """
import os, subprocess, sys, tempfile, time
file = tempfile.mkstemp()[1]
# A child in a session of its own: killing the process group would miss it.
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(os.getpid(), child.pid, file, flush=True)
{then}
"""


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the second while it is read
        return False
    return state != "Z"


def all_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def all_removed(file: Path) -> bool:
    deadline = time.monotonic() + 10
    while file.parent.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def family_of(log: Path) -> tuple[list[int], Path]:
    """Return the family's processes, and a temporary file of one of them."""
    *pids, file = log.read_text().split()
    return [int(pid) for pid in pids], Path(file)


async def started_family(log: Path, then: str) -> ChildProcess:
    child = ChildProcess("family", log)
    await child.start([sys.executable, "-c", FAMILY.format(then=then)], dict(os.environ))
    while not log.exists() or not log.read_text().endswith("\n"):
        await asyncio.sleep(0.02)
    return child


@pytest.mark.parametrize("how", ["end", "by_itself", "killed", "hangs"])
def test_a_command_takes_its_orphans_and_its_temporary_files_with_it(log: Path, how: str) -> None:
    async def run() -> None:
        then = "sys.exit(3)" if how == "by_itself" else "time.sleep(600)"
        child = await started_family(log, then)
        pids, file = family_of(log)
        assert file.parent == child.scratch
        if how == "by_itself":
            assert await child.wait() == 3
        elif how == "killed":
            os.kill(pids[0], signal.SIGKILL)
            assert await child.wait() == 128 + signal.SIGKILL
        else:
            if how == "hangs":  # the guard is killed too, and does nothing any more
                pids.pop()
                child.kill()
            await child.end()
        assert all_gone(pids)
        assert all_removed(file)

    asyncio.run(run())


def test_a_new_start_is_not_ended_by_the_end_of_the_one_before(log: Path) -> None:
    async def run() -> None:
        child = await started_family(log, "time.sleep(600)")
        old, _ = family_of(log)
        folder = child.scratch
        ending = asyncio.create_task(child.end(grace_s=0.3))
        await asyncio.sleep(0)
        log.unlink()
        await child.start(
            [sys.executable, "-c", FAMILY.format(then="time.sleep(600)")], dict(os.environ)
        )
        await ending
        assert all_gone(old)
        assert not folder.exists()
        assert child.is_running
        assert child.scratch.exists()
        await child.end()

    asyncio.run(run())


def test_a_long_path_of_temporary_files_leaves_no_room_for_sockets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for usual, of_an_engine in (("/scratch/job", "/scratch/job"), ("/scratch" * 7, "/tmp")):
        monkeypatch.setattr("tempfile.tempdir", usual)
        assert short_temporary_dir() == of_an_engine
        assert short_temporary_dir(len("/tmp")) == "/tmp"  # Ray's own names are long


def test_a_command_s_own_folder_for_temporary_files_is_kept(log: Path, tmp_path: Path) -> None:
    async def run() -> None:
        child = ChildProcess("family", log)
        command = [sys.executable, "-c", FAMILY.format(then="")]
        await child.start(command, {**os.environ, "TMPDIR": str(tmp_path)})
        await child.wait()
        await child.end()

    asyncio.run(run())
    assert family_of(log)[1].parent == tmp_path
    assert family_of(log)[1].exists()


def test_a_killed_controller_leaves_nothing_behind(log: Path) -> None:
    program = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from tests.unit.hosts.test_process import started_family

async def main():
    await started_family(Path({str(log)!r}), "time.sleep(600)")
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
    controller = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    )
    assert controller.stdout is not None
    assert controller.stdout.readline() == "ready\n"
    pids, file = family_of(log)
    assert all(is_alive(pid) for pid in pids)
    assert file.exists()
    controller.kill()
    controller.wait()
    controller.stdout.close()
    assert all_gone(pids)
    assert all_removed(file)


def test_a_path_that_an_engine_asks_for_does_not_hide_this_package() -> None:
    first, second = engine_environment({"PYTHONPATH": "/engine/site"})["PYTHONPATH"].split(":")
    assert (Path(first) / "qwen3_distill" / "types.py").is_file()
    assert second == "/engine/site"
    given = engine_environment({"PYTHONPATH": "/engine/site"}, [Path("/a"), Path("/b")])
    assert given["PYTHONPATH"].split(":") == [first, "/a", "/b", "/engine/site"]


SHARING = """
import os, sys, time
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=1 << 16)
memory.buf[0] = 1
lock = get_context("spawn").Lock()
if os.fork() == 0:
    time.sleep(600)
print(os.getpid(), memory.name, "sem." + lock._semlock.name.lstrip("/"), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["kill", "end", "dies"])
def test_shared_memory_goes_with_those_that_shared_it(log: Path, how: str) -> None:
    """Killed, neither they nor Python's own tracker, which is one of them, take it away."""

    async def run() -> list[Path]:
        child = ChildProcess("sharing", log)
        await child.start([sys.executable, "-c", SHARING], dict(os.environ))
        while not log.exists() or not log.read_text().endswith("\n"):
            await asyncio.sleep(0.02)
        pid, *names = log.read_text().split()
        files = [Path("/dev/shm", name) for name in names]
        assert len(files) == 2
        assert all(file.exists() for file in files)
        if how == "kill":
            child.kill()
            await child.wait()
        elif how == "dies":
            os.kill(int(pid), signal.SIGKILL)
            assert await child.wait() == 128 + signal.SIGKILL
        else:
            await child.end()
        return files

    assert not [file for file in asyncio.run(run()) if file.exists()]
