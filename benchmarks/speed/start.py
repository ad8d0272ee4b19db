"""Measures a run's start, and what its steps take besides their stages, as a user sees it.

    HOME=$(mktemp -d) python -m benchmarks.speed.start --config configs/h200.yaml \\
        --figure cold_start_s --steps 2 student.model=models/random-4B \\
        scoring.model=models/random-8B scoring.readiness_tolerance_nats=3.0

runs ``qwen3-distill run`` in a process of its own, on word problems that are written here, without
an evaluation, and ends it after some steps. The start lasts from the process's begin to the first
step's begin, when rollouts are asked for. Compiled kernels lie below the home directory (and in
``TORCHINDUCTOR_CACHE_DIR``): with an empty one the start is cold, with the same one again it is
warm.

Figures: the start's seconds under the name of ``--figure``; ``host_share_of_step``, the share of
the steps after the first in which no stage was at work; ``host_s`` in seconds. Details: the steps'
times, and when the run said what.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS, Report
from benchmarks.lib.device_memory import Gpu, device
from qwen3_distill.config.load import load_config

_POLL_S = 0.02
_FREE_GIB = 2.0
"""Used memory of a GPU on which nothing runs any more."""
_FREED_WITHIN_S = 60.0
_NAMES = ("Anna", "Ben", "Carla", "David", "Emil", "Fatima", "Grete", "Hao", "Ines", "Jonas")
_THINGS = ("apples", "books", "stamps", "marbles", "tickets", "coins", "shells", "pencils")


def write_problems(path: Path, count: int) -> None:
    """Write word problems as long as GSM8K's, all different."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
            has, finds, share = (draw.randint(2, 60) for _ in range(3))
            question = (
                f"{name} has {has} {thing} in box number {number}. On the way home {name} finds "
                f"{finds} more {thing}, and a friend who lives next door gives {name} another "
                f"{share} of them. How many {thing} does {name} have in the end?"
            )
            answer = f"{has} + {finds} + {share} = {has + finds + share}\n#### "
            answer += str(has + finds + share)
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")


def command_of(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command of the run, which is longer than what is measured of it."""
    given = load_config(arguments.config, arguments.overrides)
    steps = arguments.steps + 2
    problems = folder / "problems.jsonl"
    write_problems(problems, given.prompts_per_step * steps)
    suffix = getattr(given.prompts, "suffix", None)
    prompts = {
        "kind": "jsonl",
        "path": str(problems),
        "prompt_field": "question",
        "answer_field": "answer",
        **({"suffix": suffix} if suffix else {}),
    }
    return [
        sys.executable,
        *("-m", "qwen3_distill.cli.main", "run", "--config", arguments.config),
        f"prompts={json.dumps(prompts)}",
        "evaluation=null",
        f"steps={steps}",
        f"checkpoint.every_steps={steps}",
        f"output_dir={folder / 'run'}",
        *arguments.overrides,
    ]


class Watch:
    """Notes when a process says what."""

    def __init__(self, process: "subprocess.Popen[str]", began: float) -> None:
        self.lines: list[list[Any]] = []
        self._process, self._began = process, began
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read to the end."""
        self._thread.join(5)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append([round(time.perf_counter() - self._began, 2), line.rstrip()])
            print(*self.lines[-1], flush=True)


def records_of(file: Path) -> list[dict[str, Any]]:
    """Return the steps that a running run has written."""
    if not file.is_file():
        return []
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run until the steps are done; return when the first began, and their records."""
    command = command_of(arguments, folder)
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    watch = Watch(process, began)
    first_step_s: float | None = None
    records: list[dict[str, Any]] = []
    try:
        while len(records) < arguments.steps:
            ended = process.poll() is not None
            records = records_of(folder / "run" / "metrics.jsonl")
            if records and first_step_s is None:
                now = time.perf_counter() - began
                first_step_s = now - records[0]["time/step_s"]
            if ended and len(records) < arguments.steps:
                raise SystemExit(f"the run ended with status {process.poll()}: see above")
            if time.perf_counter() - began > arguments.limit_s:
                raise SystemExit(f"the run was not there after {arguments.limit_s:g} s")
            time.sleep(_POLL_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its engines' guard ends them
        process.wait()
        watch.close()
        wait_for_memory()
    return {"start_s": first_step_s, "records": records, "said": watch.lines[:200]}


def wait_for_memory() -> None:
    """Wait until the GPU is free again."""
    gpu, ends = device(), time.perf_counter() + _FREED_WITHIN_S
    while isinstance(gpu, Gpu) and gpu.used_bytes() > _FREE_GIB * 2**30:
        if time.perf_counter() > ends:
            print(f"the GPU still has {gpu.used_bytes() / 2**30:.1f} GiB in use", flush=True)
            return
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--figure", default="cold_start_s", help="name of the start's seconds")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=900)
    parser.add_argument("--folder", type=Path, default=Path("runs/start"))
    parser.add_argument("--name", default="start", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_intermixed_args()
    folder = arguments.folder.resolve() / str(os.getpid())
    folder.mkdir(parents=True)
    found = measure(arguments, folder)
    figures = {arguments.figure: found["start_s"]}
    steps = [
        {
            key: value
            for key, value in record.items()
            if key.startswith(("time/", "idle/", "tokens"))
        }
        for record in found["records"]
    ]
    if rest := steps[1:]:
        host_s = [step["idle/all_fraction"] * step["time/step_s"] for step in rest]
        figures["host_s"] = sum(host_s) / len(rest)
        figures["host_share_of_step"] = sum(host_s) / sum(step["time/step_s"] for step in rest)
    report = Report(arguments.name, arguments.results)
    report.add(arguments.figure, figures, steps=steps, said=found["said"])


if __name__ == "__main__":
    main()
