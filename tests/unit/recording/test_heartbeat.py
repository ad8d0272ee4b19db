"""What ``status.json`` says, and whether its process is alive."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.recording import heartbeat
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.recording.heartbeat import HeartbeatReporter, is_alive, this_process
from qwen3_distill.recording.trace import Trace


@pytest.fixture
def beating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HeartbeatReporter:
    monkeypatch.setattr(heartbeat, "_INTERVAL_S", 0.01)
    return HeartbeatReporter(SilentReporter(), tmp_path / "status.json", total_steps=9)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def wait_for(folder: Path, **fields: Any) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        content = read(folder)
        if all(content[key] == value for key, value in fields.items()):
            return content
        time.sleep(0.005)
    raise AssertionError(f"{fields} never came: {read(folder)}")


def test_the_file_follows_the_run(beating: HeartbeatReporter, tmp_path: Path) -> None:
    trace = Trace()
    with beating:
        assert read(tmp_path)["stage"] == "starting"
        beating.stage("loading models")
        assert wait_for(tmp_path, stage="loading models")["steps"] == 9
        beating.watch(trace)
        beating.step(3, {})
        with trace.span("generate"):
            content = read(tmp_path)
            while "generate" not in content["working"]:
                time.sleep(0.005)
                content = read(tmp_path)
            assert content["step"] == 3
            assert content["stage"] is None
            assert abs(content["working"]["generate"] - time.time()) < 20
        assert is_alive(content)
        beating.end("finished")
    assert (read(tmp_path)["ended"], read(tmp_path)["working"]) == ("finished", {})
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    ("error", "ended"),
    [(ValueError("too\nlong"), "failed: too"), (KeyboardInterrupt(), "stopped")],
)
def test_an_error_is_noted(
    beating: HeartbeatReporter, tmp_path: Path, error: BaseException, ended: str
) -> None:
    beating.watch(Trace())
    with pytest.raises(type(error)), beating:
        raise error
    assert read(tmp_path)["ended"] == ended


def test_a_first_start_that_fails_leaves_no_file(
    beating: HeartbeatReporter, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="absent"), beating:
        raise ValueError("absent")
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_written_without_a_change(beating: HeartbeatReporter, tmp_path: Path) -> None:
    with beating:
        time.sleep(0.05)
        before = (tmp_path / "status.json").stat().st_ino
        time.sleep(0.1)
        assert (tmp_path / "status.json").stat().st_ino == before


def test_a_file_that_cannot_be_written_does_not_disturb(tmp_path: Path) -> None:
    with HeartbeatReporter(
        SilentReporter(), tmp_path / "gone" / "s.json", total_steps=1
    ) as beating:
        beating.stage("on")


def test_a_process_is_alive_only_as_itself() -> None:
    mine = this_process()
    assert is_alive(mine) is True
    assert is_alive(mine | {"pid_start": "1"}) is False  # its number was given to another
    assert is_alive(mine | {"boot": "another"}) is False
    assert is_alive(mine | {"host": "another"}) is None
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = mine | {"pid": process.pid, "pid_start": heartbeat._start_of(process.pid)}
    assert is_alive(theirs) is True
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_alive(theirs) is False  # dead, and nobody has asked how it ended
    process.communicate()
    assert is_alive(theirs) is False
