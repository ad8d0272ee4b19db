"""Streaming runs of the lab pair in which a random process is killed, stopped or slowed.

    python -m benchmarks.robustness.faults --runs 100 --workers 1

Every run has its three embedded engines in processes of their own. At a random moment after the
learner has reached a random step, one of them is struck: killed (SIGKILL), stopped for good
(SIGSTOP), or stopped for a second or two and then continued. The run must end by itself, and its
ledger must name every drawn rollout exactly once: trained on, or dropped as too old. A run that
takes longer than ``--limit-s`` counts as not finished. Runs are processes of their own, so a crash
of one cannot hide another. After an interruption, ``--resume`` continues from the result.

Figures: ``runs``, ``finished``, ``lost`` and ``duplicated`` (rollouts over all runs), ``stale``
(dropped and counted), ``struck`` (runs whose fault came before their end).
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS, write_result
from qwen3_distill.config.load import load_config
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.pipeline import run as run_module
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.recording.jsonl import read_jsonl

ROOT = Path(__file__).parents[2]
STEPS, ROLLOUTS = 8, 16
STAGES, FAULTS = ("generate", "score", "train"), ("kill", "hang", "slow")
DELAY_S = 0.7
"""Longest delay of a fault after its step: the time of some steps."""
LAST_STEPS = 2
"""Last steps, which start no fault, so that it nearly always comes before the end."""
HANG_TIMEOUT_S = 8.0


def settings_of(steps: int, rollouts: int, *, hang_timeout_s: float, stall_s: int) -> list[str]:
    """Return the overrides of a run that is struck: streaming, every engine in its process."""
    stages = ("generation", "scoring", "training")
    return [
        f"steps={steps}",
        f"prompts_per_step={rollouts}",
        "evaluation=null",
        "checkpoint.every_steps=2",
        "logging.tensorboard=false",
        "pipeline={kind: streaming, max_staleness_steps: 2, max_in_flight: 16, "
        f"stall_timeout_s: {stall_s}}}",
        *(f"{stage}.own_process=true" for stage in stages),
        *(f"{stage}.threads=1" for stage in stages),
        *(f"{stage}.hang_timeout_s={hang_timeout_s}" for stage in stages),
    ]


# --- One run ------------------------------------------------------------------------------------


class Striker:
    """Strikes a random process at a random moment of a run."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.stage, self.fault = rng.choice(STAGES), rng.choice(FAULTS)
        self.step, self.delay_s = rng.randrange(STEPS - LAST_STEPS), rng.uniform(0, DELAY_S)
        self.pause_s = rng.uniform(0.5, 2.5)
        self.struck_at_step: int | None = None
        self._task: asyncio.Task[None] | None = None

    def attach(self, parts: Parts) -> Parts:
        """Start the watch at the first push of weights, when all engines are running."""
        part = {"generate": parts.engine, "score": parts.required_teacher, "train": parts.learner}
        engine: Any = parts.engine
        load = engine.load

        async def first_load(*arguments: Any) -> None:
            if self._task is None:
                self._task = asyncio.create_task(self._strike(part[self.stage], parts))
            await load(*arguments)

        engine.load = first_load
        return parts

    async def _strike(self, part: Any, parts: Parts) -> None:
        while parts.learner.version.step < self.step:
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.delay_s)
        worker = part.host
        assert isinstance(worker, LocalProcess), "only a local process has a pid to strike"
        pid = worker.pid
        if pid is None or not worker.is_running:
            return  # between two starts: there is nothing to strike
        self.struck_at_step = parts.learner.version.step
        os.killpg(pid, signal.SIGKILL if self.fault == "kill" else signal.SIGSTOP)
        if self.fault == "slow":
            await asyncio.sleep(self.pause_s)
            os.killpg(pid, signal.SIGCONT)


def one_run(seed: int, folder: Path) -> dict[str, Any]:
    """Run once with one fault; return the counts of its ledger."""
    striker = Striker(seed)
    models = (
        f"student.model={ROOT}/models/lab/student",
        f"scoring.model={ROOT}/models/lab/teacher",
    )
    settings = settings_of(STEPS, ROLLOUTS, hang_timeout_s=HANG_TIMEOUT_S, stall_s=120)
    overrides = [f"output_dir={folder}", f"seed={seed}", *models, *settings]
    config = load_config(ROOT / "configs" / "demo.yaml", overrides)
    warnings: list[str] = []
    began = time.perf_counter()
    summary = run_module.run(config, SilentReporter(), warnings.append, striker.attach)
    records = read_jsonl(folder / "ledger.jsonl")
    trained = [int(entry) for r in records for entry in r["trained"].split()]
    dropped = [int(entry.split(":")[0]) for r in records for entry in r["dropped"].split()]
    counts = Counter(trained + dropped)
    asked_for = range(max(counts) + 1)
    return {
        "seed": seed,
        "stage": striker.stage,
        "fault": striker.fault,
        "struck_at_step": striker.struck_at_step,
        "finished": summary is not None and len(records) == STEPS,
        "lost": sum(number not in counts for number in asked_for),
        "duplicated": sum(count - 1 for count in counts.values()),
        "stale": len(dropped),
        "wall_s": time.perf_counter() - began,
        "warnings": warnings,
    }


# --- All of them --------------------------------------------------------------------------------


def run_apart(seed: int, limit_s: float) -> dict[str, Any]:
    """`one_run` in a process of its own, killed if it takes too long."""
    with tempfile.TemporaryDirectory(prefix="qwen3-distill-faults-") as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.robustness.faults", "--one", str(seed)]
        command += ["--out", str(out), "--folder", str(Path(folder) / "run")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return {"seed": seed, "finished": False, "error": f"not done after {limit_s:.0f} s"}
        if process.returncode != 0 or not out.exists():
            return {"seed": seed, "finished": False, "error": errors[-1500:]}
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=300.0)
    parser.add_argument("--resume", action="store_true", help="runs of the result are kept")
    parser.add_argument("--name", default="faults", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        arguments.out.write_text(json.dumps(one_run(arguments.one, arguments.folder)))
        return
    results: list[dict[str, Any]] = []
    earlier = arguments.results / f"{arguments.name}.json"
    if arguments.resume and earlier.exists():
        results = json.loads(earlier.read_text())["results"]
    done = {result["seed"] for result in results}
    began = time.perf_counter()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.runs)
    left = [seed for seed in seeds if seed not in done]
    with ThreadPoolExecutor(arguments.workers) as pool:
        for result in pool.map(lambda seed: run_apart(seed, arguments.limit_s), left):
            results.append(result)
            spent, new = time.perf_counter() - began, len(results) - len(done)
            left_s = spent / new * (len(left) - new)
            print(
                f"[{len(results)}/{arguments.runs}, ETA {left_s / 60:.0f} min] {result}", flush=True
            )
            report(arguments, results)
    bad = [r for r in results if not r["finished"] or r.get("lost") or r.get("duplicated")]
    sys.exit(1 if bad else 0)


def report(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    def total(key: str) -> int:
        return sum(result.get(key) or 0 for result in results)

    figures: dict[str, float] = {
        "runs": len(results),
        "finished": sum(result["finished"] for result in results),
        "lost": total("lost"),
        "duplicated": total("duplicated"),
        "stale": total("stale"),
        "struck": sum(result.get("struck_at_step") is not None for result in results),
    }
    kinds = Counter(f"{r.get('stage')}/{r.get('fault')}" for r in results)
    write_result(
        arguments.name,
        figures,
        folder=arguments.results,
        by_kind=dict(sorted(kinds.items())),
        results=[{k: v for k, v in r.items() if k != "warnings"} for r in results],
    )


if __name__ == "__main__":
    main()
