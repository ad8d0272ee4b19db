"""The MPS daemon's life, with a fake control program: no GPU is touched."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen3_distill.errors import MpsUnavailable
from qwen3_distill.hosts import mps
from qwen3_distill.hosts.mps import CONTROL, LOG_VARIABLE, PIPE_VARIABLE, MpsDaemon, private_mps

# As the real one: a daemon in the foreground, which starts a server for its first client (here one
# that leaves a file), and commands to the daemon on stdin. The server has a session of its own, so
# that ending the daemon's process group does not end it.
FAKE_CONTROL = f"""#!{sys.executable} -IS
# FAKE nvidia-cuda-mps-control of the test suite
import os, subprocess, sys, time
from pathlib import Path

pipes, pids = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"]), Path(os.environ["FAKE_PIDS"])
mode = os.environ.get("FAKE_MPS")
if sys.argv[1:] == ["-f"]:
    if mode == "refuses":
        sys.exit("fake: MPS is not supported here")
    (pids / "daemon").write_text(str(os.getpid()))
    print("devices", os.environ.get("CUDA_VISIBLE_DEVICES", "all"), flush=True)
    time.sleep(1000 if mode == "mute" else 0.2)
    (pipes / "control").touch()
    server = None
    while not (pipes / "quit").exists():
        time.sleep(0.01)
        if server is None and (pipes / "client").exists():
            server = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            (pids / "server").write_text(str(server.pid))
    if mode == "stays":
        time.sleep(1000)
    if server is not None:
        server.kill()
    (pids / "quit").touch()
    sys.exit()
command = sys.stdin.readline().split()
if not (pipes / "control").exists():
    sys.exit("Cannot find MPS control daemon process")
if command[0] == "quit":
    (pipes / "quit").touch()
if command[0] == "get_server_list" and (pipes / "client").exists():
    while not (pids / "server").exists():
        time.sleep(0.01)
    print((pids / "server").read_text())
"""
SERVED = ("sh", "-c", 'touch "$CUDA_MPS_PIPE_DIRECTORY/client"')
NOT_SERVED = ("sh", "-c", "echo a traceback; echo cuInit: CUDA error 805; exit 1")
UNAWARE = ("true",)


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the fake the program that is found; its processes leave their ids in this folder."""
    programs, pids = tmp_path / "fake", tmp_path / "pids"
    programs.mkdir()
    pids.mkdir()
    program = programs / CONTROL
    program.write_text(FAKE_CONTROL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_PIDS", str(pids))
    monkeypatch.setattr("qwen3_distill.hosts.child.short_temporary_dir", lambda: str(tmp_path))
    monkeypatch.delenv(PIPE_VARIABLE, raising=False)
    return pids


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "mps.log"


def has_ended(pid_file: Path) -> bool:
    """Whether the process is gone, or goes within seconds."""
    stat = Path(f"/proc/{int(pid_file.read_text())}/stat")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def pipe_folders(tmp_path: Path) -> list[Path]:
    return [folder / "pipes" for folder in tmp_path.glob("q3d-*")]


def start_fails(daemon: MpsDaemon, tmp_path: Path, *words: str) -> None:
    async def start() -> None:
        with pytest.raises(MpsUnavailable) as caught:
            await daemon.start()
        missing = [word for word in words if word not in str(caught.value)]
        assert not missing, caught.value

    asyncio.run(start())
    assert daemon.variables == {}
    assert pipe_folders(tmp_path) == []


def test_a_process_started_in_the_block_is_a_client(
    pids: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv(LOG_VARIABLE, "before")
    warnings: list[str] = []

    async def use() -> None:
        async with private_mps(MpsDaemon(log, client=SERVED), warnings.append):
            assert pipe_folders(tmp_path) == [Path(os.environ[PIPE_VARIABLE])]
            assert os.environ[LOG_VARIABLE] == str(log.parent / "mps")
            listed = subprocess.run([CONTROL], input="get_server_list", stdout=-1, text=True)
            assert listed.stdout.strip() == (pids / "server").read_text()
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
            assert "devices all" in log.read_text()  # the daemon renumbers nothing

    asyncio.run(use())
    assert warnings == []
    assert (pids / "quit").exists()
    assert has_ended(pids / "daemon")
    assert has_ended(pids / "server")
    assert PIPE_VARIABLE not in os.environ
    assert os.environ[LOG_VARIABLE] == "before"
    assert pipe_folders(tmp_path) == []


def test_an_error_in_the_block_ends_the_daemon(pids: Path, log: Path) -> None:
    async def use() -> None:
        async with private_mps(MpsDaemon(log, client=SERVED), print):
            raise ValueError("engine")

    with pytest.raises(ValueError, match="engine"):
        asyncio.run(use())
    assert has_ended(pids / "daemon")
    assert has_ended(pids / "server")
    assert PIPE_VARIABLE not in os.environ


def test_without_the_program_the_block_runs_all_the_same(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    warnings: list[str] = []
    ran: list[bool] = []

    async def use() -> None:
        async with private_mps(MpsDaemon(log), warnings.append):
            ran.append(PIPE_VARIABLE in os.environ)

    asyncio.run(use())
    assert ran == [False]
    (warning,) = warnings
    assert warning.startswith("the run goes on without MPS: ")
    assert CONTROL in warning
    assert "PATH" in warning


def test_a_daemon_that_refuses_is_quoted(
    pids: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPS", "refuses")
    start_fails(MpsDaemon(log, client=SERVED), tmp_path, "ended at once", "not supported here")


def test_a_daemon_that_does_not_answer_is_ended(
    pids: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPS", "mute")
    monkeypatch.setattr(mps, "_START_TIMEOUT_S", 1.0)
    start_fails(MpsDaemon(log, client=SERVED), tmp_path, "does not answer")
    assert has_ended(pids / "daemon")


def test_a_client_that_is_not_served_ends_the_daemon(pids: Path, log: Path, tmp_path: Path) -> None:
    words = ("cannot use the GPU", "cuInit: CUDA error 805")
    start_fails(MpsDaemon(log, client=NOT_SERVED), tmp_path, *words)
    assert has_ended(pids / "daemon")


def test_a_client_that_goes_past_the_daemon_is_found_out(
    pids: Path, log: Path, tmp_path: Path
) -> None:
    start_fails(MpsDaemon(log, client=UNAWARE), tmp_path, "without the daemon")
    assert has_ended(pids / "daemon")


def test_a_client_that_hangs_is_killed(
    pids: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps, "_CLIENT_TIMEOUT_S", 0.5)
    client = ("sh", "-c", 'echo $$ > "$FAKE_PIDS/client"; exec sleep 1000')
    start_fails(MpsDaemon(log, client=client), tmp_path, "did not end")
    assert has_ended(pids / "client")
    assert has_ended(pids / "daemon")


def test_the_real_client_says_why_where_there_is_no_gpu(
    pids: Path, log: Path, tmp_path: Path
) -> None:
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}  # on a machine that has one
    client = ("env", *(f"{k}={v}" for k, v in no_gpu.items()), *mps.CLIENT)
    start_fails(MpsDaemon(log, client=client), tmp_path, "cannot use the GPU", "cu")


def test_a_daemon_that_does_not_quit_is_killed_with_its_server(
    pids: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPS", "stays")
    monkeypatch.setattr(mps, "_QUIT_TIMEOUT_S", 0.5)

    async def use() -> None:
        daemon = MpsDaemon(log, client=SERVED)
        await daemon.start()
        await daemon.stop()
        await daemon.stop()

    asyncio.run(use())
    assert has_ended(pids / "daemon")
    assert has_ended(pids / "server")


OWNER = f"""
import asyncio, sys
from pathlib import Path
from qwen3_distill.hosts.mps import MpsDaemon

async def own():
    await MpsDaemon(Path(sys.argv[1]), client={SERVED!r}).start()
    print("started", flush=True)
    await asyncio.sleep(1000)

asyncio.run(own())
"""


def test_the_daemon_and_its_server_end_when_the_run_is_killed(pids: Path, log: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(log)], stdout=-1, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "started\n"
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert has_ended(pids / "daemon")
    assert has_ended(pids / "server")
