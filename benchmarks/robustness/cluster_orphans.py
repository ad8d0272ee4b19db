"""Kills runs that started Ray by themselves, and counts what each of them leaves behind.

    python -m benchmarks.robustness.cluster_orphans --runs 20

Every run is the lab pair with a rollout engine and a teacher in a Ray of its own. It is killed
(SIGKILL) at a random moment of its first ``--within-s`` seconds. Half a minute later nothing of it
may be left: no process that inherited the run's variable, no file of Ray's in the folders for
temporary files and in shared memory.

Figures: ``runs``, ``processes_left``, ``files_left``, ``engines_ran`` (runs that were killed after
their engines had started).
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS, write_result

ROOT = Path(__file__).parents[2]
_MARK = "QWEN3_DISTILL_ORPHAN_MARK"
_PATTERNS = ("q3d-ray-*", "qwen3-distill-host-*", "ray/session_*", "plasma*")
_LEAVE_S = 30.0
CLUSTER = "{card_resource: slot, cards_here: 2, object_store_gib: 0.1, rollouts: {}, teachers: {}}"
SETTINGS = (
    "steps=100000",
    f"student.model={ROOT}/models/lab/student",
    f"scoring.model={ROOT}/models/lab/teacher",
    "evaluation=null",
    "logging.tensorboard=false",
    *(f"{stage}.own_process=true" for stage in ("generation", "scoring")),
    *(f"{stage}.threads=1" for stage in ("generation", "scoring")),
    f"cluster={CLUSTER}",
)


def processes_of(mark: str) -> list[str]:
    """List the processes that have inherited a run's variable."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found.append(f"{folder.name} {command[:200]}")
            except OSError:
                continue
    return found


def files_of_ray() -> set[str]:
    folders = (Path("/tmp"), Path("/dev/shm"))
    return {str(path) for folder in folders for glob in _PATTERNS for path in folder.glob(glob)}


def one_run(number: int, within_s: float) -> dict[str, Any]:
    """Start a run, kill it, and say what is left of it."""
    before, mark = files_of_ray(), f"{os.getpid()}-{number}"
    delay_s = random.Random(number).uniform(1.0, within_s)
    with tempfile.TemporaryDirectory(prefix="qwen3-distill-orphans-") as folder:
        command = [sys.executable, "-m", "qwen3_distill.cli.main", "run"]
        command += ["--config", str(ROOT / "configs" / "demo.yaml"), *SETTINGS]
        driver = subprocess.Popen(
            [*command, f"output_dir={folder}/run"],
            env=os.environ | {_MARK: mark, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(delay_s)
        was_running = driver.poll() is None
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        engines_ran = (Path(folder) / "run" / "logs" / "teacher-0.log").exists()
        end = time.monotonic() + _LEAVE_S
        while time.monotonic() < end and (processes_of(mark) or files_of_ray() - before):
            time.sleep(0.2)
        return {
            "delay_s": delay_s,
            "was_running": was_running,
            "engines_ran": engines_ran,
            "processes": processes_of(mark),
            "files": sorted(files_of_ray() - before),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--within-s", type=float, default=40.0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    results = []
    for number in range(arguments.runs):
        results.append(one_run(number, arguments.within_s))
        print(f"[{number + 1}/{arguments.runs}] {results[-1]}", flush=True)
    figures: dict[str, float] = {
        "runs": sum(result["was_running"] for result in results),
        "processes_left": sum(len(result["processes"]) for result in results),
        "files_left": sum(len(result["files"]) for result in results),
        "engines_ran": sum(result["engines_ran"] for result in results),
    }
    write_result("cluster_orphans", figures, folder=arguments.results, results=results)
    sys.exit(1 if figures["processes_left"] or figures["files_left"] else 0)


if __name__ == "__main__":
    main()
