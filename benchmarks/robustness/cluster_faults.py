"""Runs of the lab pair on a Ray cluster of three nodes, in which something random is struck.

    python -m benchmarks.robustness.cluster_faults --runs 60

The three nodes are on this machine, with a named resource for cards. Every run has two rollout
replicas, two teachers and two ranks of the learner in places of the cluster. At a random moment
after a random step a replica, a teacher, a rank, a raylet or the driver is struck: killed
(SIGKILL), stopped for good (SIGSTOP), or stopped for a second or two; a raylet and the driver are
killed. Of an engine or rank, either Ray's actor is struck or the process that computes. The run
must end by itself, the driver's by starting it again, and its ledger must name every drawn rollout
exactly once. A run that takes longer than ``--limit-s`` counts as not finished. After an
interruption, ``--resume`` continues from the result.

Figures: ``runs``, ``finished``, ``lost`` and ``duplicated`` (rollouts over all runs), ``stale``
(dropped as too old, and counted), ``struck`` (runs whose fault came before their end).
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
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS, write_result
from benchmarks.lib.ray_nodes import CARD, RayNodes, raylet_pids
from benchmarks.robustness.faults import settings_of
from qwen3_distill.config.load import load_config
from qwen3_distill.pipeline import run as run_module
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.recording.jsonl import read_jsonl

ROOT = Path(__file__).parents[2]
STEPS, ROLLOUTS = 8, 16
STAGES = ("generation", "scoring", "training")
TARGETS = ("replica", "teacher", "rank", "raylet", "driver")
FAULTS = ("kill", "hang", "slow")
DELAY_S = 0.7
LAST_STEPS = 2
"""Last steps, which start no fault, so that it nearly always comes before the end."""
CALL_TIMEOUT_S = 8.0
GROUP_TIMEOUT_S = 40.0
"""How long the ranks may take to meet: several processes start on two cores."""
STARTS = 3
"""Starts of a driver that may be needed: one more than it is killed."""


class Striker:
    """Strikes something random at a random moment of a run."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.target = TARGETS[seed % len(TARGETS)]
        self.fault = "kill" if self.target in ("raylet", "driver") else rng.choice(FAULTS)
        self.member = rng.randrange(2)
        self.step, self.delay_s = rng.randrange(STEPS - LAST_STEPS), rng.uniform(0, DELAY_S)
        self.pause_s = rng.uniform(0.5, 2.5)
        self.process = rng.choice(("actor", "worker"))
        self.struck_at_step: int | None = None
        self._task: asyncio.Task[None] | None = None

    def attach(self, parts: Parts) -> Parts:
        """Start the watch at the first push of weights, when all engines are running."""
        engine: Any = parts.engine
        load = engine.load

        async def first_load(*arguments: Any) -> None:
            if self._task is None:
                self._task = asyncio.create_task(self._strike(parts))
            await load(*arguments)

        engine.load = first_load
        return parts

    async def _strike(self, parts: Parts) -> None:
        while parts.learner.version.step < self.step:
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.delay_s)
        self.struck_at_step = parts.learner.version.step
        if self.target == "driver":
            os.kill(os.getpid(), signal.SIGKILL)
        engine, teacher, learner = parts.engine, parts.teacher, parts.learner
        members: dict[str, Any] = {}
        members["rank"] = getattr(learner, "ranks")[self.member]  # noqa: B009
        members["teacher"] = getattr(teacher, "teachers")[self.member]  # noqa: B009
        members["replica"] = members["raylet"] = getattr(engine, "replicas")[self.member]  # noqa: B009
        host = members[self.target].host
        if self.target == "raylet":
            pid = raylet_pids().get(host.place.facts.node_id)
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
            return
        if host.actor is None:
            self.struck_at_step = None  # between two starts: there is nothing to strike
            return
        actor, worker = await host.actor.pids.remote()
        if self.process == "worker" and worker is None:
            self.struck_at_step = None  # it is being started
            return
        # The worker's guard leads a group of processes, with the worker in it.
        pid, kill = (actor, os.kill) if self.process == "actor" else (worker, os.killpg)
        kill(pid, signal.SIGKILL if self.fault == "kill" else signal.SIGSTOP)
        if self.fault == "slow":
            await asyncio.sleep(self.pause_s)
            kill(pid, signal.SIGCONT)


def one_run(seed: int, folder: Path, address: str, strikes: bool) -> dict[str, Any]:
    """Run once; return the counts of its ledger."""
    striker = Striker(seed)
    cluster = {
        "address": address,
        "card_resource": CARD,
        "call_timeout_s": CALL_TIMEOUT_S,
        "rollouts": {"replicas": 2},
        "teachers": {"replicas": 2},
        "learner": {"ranks": 2},
    }
    models = (
        f"student.model={ROOT}/models/lab/student",
        f"scoring.model={ROOT}/models/lab/teacher",
    )
    settings = settings_of(STEPS, ROLLOUTS, hang_timeout_s=CALL_TIMEOUT_S, stall_s=240)
    overrides = [f"output_dir={folder}", f"seed={seed}", *models, *settings]
    overrides.append(f"cluster={json.dumps(cluster)}")
    overrides.append(f"training.hang_timeout_s={GROUP_TIMEOUT_S}")
    config = load_config(ROOT / "configs" / "demo.yaml", overrides)
    warnings: list[str] = []
    summary = run_module.run(
        config,
        SilentReporter(),
        warnings.append,
        striker.attach if strikes else (lambda parts: parts),
    )
    records = read_jsonl(folder / "ledger.jsonl")
    trained = [int(entry) for r in records for entry in r["trained"].split()]
    dropped = [int(entry.split(":")[0]) for r in records for entry in r["dropped"].split()]
    counts = Counter(trained + dropped)
    return {
        "struck_at_step": striker.struck_at_step,
        "finished": summary is not None and len(records) == STEPS,
        "lost": sum(number not in counts for number in range(max(counts) + 1)),
        "duplicated": sum(count - 1 for count in counts.values()),
        "stale": len(dropped),
        "warnings": warnings,
    }


def run_apart(seed: int, address: str, limit_s: float) -> dict[str, Any]:
    """`one_run` in a process of its own, started again after its driver was struck."""
    striker = Striker(seed)
    what = {"seed": seed, "target": striker.target, "fault": striker.fault}
    if striker.target in ("replica", "teacher", "rank"):
        what["process"] = striker.process
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="qwen3-distill-faults-") as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.robustness.cluster_faults"]
        command += ["--one", str(seed), "--address", address, "--out", str(out)]
        command += ["--folder", str(Path(folder) / "run")]
        was_struck = False
        for _ in range(STARTS):
            process = subprocess.Popen(
                [*command, "--again"] if was_struck else command,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
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
                return what | {"finished": False, "error": f"not done after {limit_s:.0f} s"}
            if process.returncode == -signal.SIGKILL and striker.target == "driver":
                was_struck = True
                continue
            if process.returncode != 0 or not out.exists():
                return what | {"finished": False, "error": errors[-1500:]}
            result = json.loads(out.read_text())
            if was_struck:
                result["struck_at_step"] = striker.step
            return what | result | {"wall_s": time.perf_counter() - began}
    return what | {"finished": False, "error": "the driver was killed again and again"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=600.0)
    parser.add_argument("--resume", action="store_true", help="runs of the result are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    for hidden in ("--one", "--address", "--folder", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        found = one_run(
            int(arguments.one), Path(arguments.folder), arguments.address, not arguments.again
        )
        Path(arguments.out).write_text(json.dumps(found))
        return
    results: list[dict[str, Any]] = []
    earlier = arguments.results / "cluster_faults.json"
    if arguments.resume and earlier.exists():
        results = json.loads(earlier.read_text())["results"]
    done = {result["seed"] for result in results}
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.runs)
    left = [seed for seed in seeds if seed not in done]
    began = time.perf_counter()
    with RayNodes() as nodes:
        for number, seed in enumerate(left, 1):
            nodes.replace_dead()
            results.append(run_apart(seed, nodes.address, arguments.limit_s))
            each_s = (time.perf_counter() - began) / number
            eta = each_s * (len(left) - number) / 60
            print(f"[{len(results)}/{arguments.runs}, ETA {eta:.0f} min] {results[-1]}", flush=True)
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
    kinds = Counter(f"{r.get('target')}/{r.get('fault')}" for r in results)
    write_result(
        "cluster_faults",
        figures,
        folder=arguments.results,
        by_kind=dict(sorted(kinds.items())),
        results=[{k: v for k, v in r.items() if k != "warnings"} for r in results],
    )


if __name__ == "__main__":
    main()
