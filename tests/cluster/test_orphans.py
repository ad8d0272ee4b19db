"""A run that starts Ray by itself leaves nothing behind, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipeline.builders import tiny_values, write_config
from tests.tiny_models import TinyModels

pytest.importorskip("ray")
pytestmark = pytest.mark.cluster

MARK = "QWEN3_DISTILL_TEST_MARK"
LIMIT_S = 120.0


def marked_processes(mark: str) -> list[str]:
    """Command lines of the processes that have inherited a test's variable."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found.append(f"{folder.name} {command}")
            except OSError:
                continue
    return found


def files_of_ray() -> set[Path]:
    return {
        path
        for folder in ("/tmp", "/dev/shm")
        for pattern in ("q3d-ray-*", "plasma*")
        for path in Path(folder).glob(pattern)
    }


def wait_until(condition, limit_s: float, what: str) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@pytest.mark.parametrize("moment", ["starting Ray", "engines start", "running"])
def test_a_killed_driver_leaves_no_process_and_no_file(
    tiny_models: TinyModels, tmp_path: Path, moment: str
) -> None:
    before = files_of_ray()
    values = tiny_values(
        tiny_models,
        tmp_path / "run",
        {"steps": 10_000, "generation.own_process": True, "scoring.own_process": True},
    )
    values["cluster"] = {
        "card_resource": "slot",
        "cards_here": 2,
        "object_store_gib": 0.1,
        "rollouts": {},
        "teachers": {},
    }
    file = write_config(tmp_path / "config.yaml", values)
    mark = f"{os.getpid()}-{moment.replace(' ', '-')}"
    driver = subprocess.Popen(
        [sys.executable, "-m", "qwen3_distill.cli.main", "run", "--config", str(file)],
        env=os.environ | {MARK: mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    signs = {
        "starting Ray": lambda: any("raylet" in line for line in marked_processes(mark)),
        "engines start": lambda: (tmp_path / "run" / "logs" / "rollouts-0.log").exists(),
        "running": lambda: (tmp_path / "run" / "metrics.jsonl").exists(),
    }
    try:
        wait_until(signs[moment], LIMIT_S, f"the run never got to: {moment}")
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        wait_until(lambda: not marked_processes(mark), 30.0, f"left: {marked_processes(mark)}")
        wait_until(lambda: files_of_ray() <= before, 5.0, f"left: {files_of_ray() - before}")
    finally:
        driver.kill()
        driver.wait()
