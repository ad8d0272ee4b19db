"""Runs the arms of the cost comparison side by side on one device, and keeps what is finished.

    python -m benchmarks.evidence.run --trials --log runs/evidence/trials.jsonl
    python -m benchmarks.evidence.run --log runs/evidence/runs.jsonl

Each run is the product's own loop, in one of `--workers` processes that do one run after another
and share the machine's GPUs, as many on each, through MPS where it starts. A finished run is one
line of the log; the same command continues after an interruption or on another machine that has the
log, and starts no run that would not end within `--time-limit-s`. All arms of the first seed come
before those of the next.

The counted runs take each arm's learning rate from its trials: the one with the highest mean of
both decodings' accuracies after the last step.
"""

import argparse
import asyncio
import contextlib
import io
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

from benchmarks.evidence.arms import ARMS, LEARNING_RATES, arm_sections, tuned_name
from benchmarks.evidence.settings import (
    EVALUATION_STEPS,
    HELDOUT,
    MODELS,
    SETTINGS,
    TRIAL_FIRST,
    TRIAL_HELDOUT,
    TRIAL_SEED,
    TRIAL_STEPS,
    Setting,
)
from benchmarks.evidence.training import loss_on
from benchmarks.lib.sweep import Record, Sweep
from qwen3_distill.config.load import check_config
from qwen3_distill.hosts.mps import MpsDaemon, private_mps
from qwen3_distill.pipeline.manifest import git_revision
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.recording.cost_records import COST_FILE, fold
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.utils.variables import set_in_environment

SEEDS = 5
_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


def run_once(setting: str, arm: str, seed: int, sizes: dict[str, Any]) -> Record:
    """Train and evaluate one student, in this process; return its curve.

    Args:
        sizes: ``models``, ``device``, ``batching``, ``steps``, ``learning_rate``, ``problems``,
            ``first_problem`` and ``at_steps``.
    """
    started = time.perf_counter()
    said = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="evidence-") as folder:
        config = check_config(config_values(setting, arm, seed, sizes, folder))
        with contextlib.redirect_stdout(said):
            summary = run(config, SilentReporter(), lambda text: None, ARMS[arm].adapt)
        if summary is None:
            raise KeyboardInterrupt
        evaluations = read_jsonl(Path(folder) / "evaluations.jsonl")
        curve = curve_of(evaluations, read_jsonl(Path(folder) / COST_FILE))
        warm_data = Path(sizes["models"]) / setting / "warm_data.json"
        forgetting = loss_on(Path(folder) / "student", warm_data, sizes["device"])
    return {
        "setting": setting,
        "arm": arm,
        "seed": seed,
        "learning_rate": sizes["learning_rate"],
        "curve": curve,
        "warm_data_loss": forgetting,
        "commit": (git_revision(Path(__file__).parent) or {"commit": "unknown"})["commit"],
        "wall_s": time.perf_counter() - started,
    }


def config_values(
    setting: str, arm: str, seed: int, sizes: Mapping[str, Any], folder: str
) -> dict[str, Any]:
    """Return the config of a run. Nothing but the arm's sections and the seed differs."""
    of, how, models = SETTINGS[setting], ARMS[arm], Path(sizes["models"])
    device = sizes["device"]
    scoring = None
    if how.teacher is not None:
        scoring = {"kind": "embedded", "device": device, "model": str(models / how.teacher)}
    return {
        "output_dir": folder,
        "seed": seed,
        "steps": sizes["steps"],
        "student": {"model": str(models / setting / "student")},
        "prompts": {"kind": "task", "task": of.task, "split": "train"},
        "sampling": {"temperature": 1.0, "max_new_tokens": of.max_new_tokens},
        "generation": {
            "kind": "embedded",
            "device": device,
            "batching": sizes["batching"],
            "max_sequences": 2048,
        },
        "scoring": scoring,
        "training": {
            "kind": "embedded",
            "device": device,
            "optimizer": {
                "learning_rate": sizes["learning_rate"],
                "betas": [0.9, 0.98],
                # Constant after the warm-up: every point of the curve could be the end.
                "schedule": {"kind": "warmup_cosine", "warmup_steps": 5, "final_fraction": 1.0},
            },
            "micro_batch_tokens": of.micro_batch_tokens,
            "chunk_tokens": of.micro_batch_tokens,
        },
        "verifier": {"kind": "task", "task": of.task},
        "evaluation": _evaluation(of, sizes),
        "checkpoint": {"every_steps": sizes["steps"], "keep_last": 1},
        "logging": {
            "tensorboard": False,
            "trace": False,
            "rollouts_every_steps": sizes["steps"],
            "rollouts_per_save": 1,
        },
        **arm_sections(
            how,
            steps=sizes["steps"],
            rollouts_per_step=of.rollouts_per_step,
            max_new=of.max_new_tokens,
        ),
    }


def _evaluation(of: Setting, sizes: Mapping[str, Any]) -> dict[str, Any]:
    task = {"kind": "task", "task": of.task}
    return {
        "prompts": {**task, "split": "eval", "first": sizes["first_problem"]},
        "verifier": task,
        "sampling": {"temperature": 1.0, "max_new_tokens": of.max_new_tokens},
        "second_temperature": 0.0,
        "at_steps": list(sizes["at_steps"]),
        "num_problems": sizes["problems"],
        "teacher": False,
    }


def curve_of(
    evaluations: Sequence[Mapping[str, Any]], ledger: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Join each step's two evaluations with the marginal cost so far, a point per evaluated step.

    Args:
        ledger: the lines of the run's ``cost.jsonl``.
    """
    points: dict[int, dict[str, Any]] = {}
    for record in evaluations:
        point = points.setdefault(record["step"], {"step": record["step"]})
        which = "greedy" if record.get("temperature") == 0 else "sampled"
        point[which] = round(record["accuracy"], 5)
        point[f"{which}_tokens"] = round(record["mean_tokens"], 2)
        point[f"{which}_truncated"] = round(record["truncated_fraction"], 5)
        point["problems"] = record["num_problems"]
    for step, point in points.items():
        spent = fold([line for line in ledger if line["step"] <= step]).marginal
        point["flops"] = {k[6:]: v for k, v in spent.items() if k.startswith("flops/")}
        point["tokens"] = {k[7:]: v for k, v in spent.items() if k.startswith("tokens/")}
        point["device_s"] = {
            k[9:]: round(v, 3) for k, v in spent.items() if k.startswith("device_s/")
        }
    return [points[step] for step in sorted(points)]


def jobs_of(
    settings: Sequence[str], arms: Sequence[str], seeds: Sequence[int], sizes: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """All arms of a seed before the next seed; the longest setting first."""
    return {
        f"{setting}/{arm}/seed-{seed}": [setting, arm, seed, dict(sizes)]
        for seed in seeds
        for setting in settings
        for arm in arms
    }


def trial_jobs(
    settings: Sequence[str], arms: Sequence[str], sizes: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """The same number of trials for every arm with a learning rate of its own."""
    own = [arm for arm in arms if tuned_name(arm) == arm]
    return {
        f"{setting}/{arm}/rate-{rate:g}": [
            setting,
            arm,
            TRIAL_SEED,
            {**sizes, "learning_rate": rate},
        ]
        for setting in settings
        for arm in own
        for rate in LEARNING_RATES
    }


def chosen_rates(trials: Sequence[Record]) -> dict[tuple[str, str], float]:
    """By setting and arm, the rate of the best trial."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for record in trials:
        last = record["curve"][-1]
        score = (last["greedy"] + last["sampled"]) / 2
        key = (record["setting"], record["arm"])
        best[key] = max(best.get(key, (-1.0, 0.0)), (score, record["learning_rate"]))
    return {key: rate for key, (_, rate) in best.items()}


class _OneGpuProcess(SpawnProcess):
    """A process that sees one of the machine's GPUs.

    CUDA reads the variable once, and importing PyTorch's users can be that time already: so it is
    set for the new process, and not in it.
    """

    gpus: ClassVar[Iterator[str]] = iter(())
    """For each process that is started, the GPU that it sees; at the end, all."""

    def start(self) -> None:
        gpu = next(self.gpus, None)
        changed = {} if gpu is None else {_VISIBLE_GPUS: gpu}
        with set_in_environment(changed):
            super().start()


class _OneGpuContext(SpawnContext):
    Process = _OneGpuProcess


def workers(count: int) -> Executor:
    """Start worker processes that import once and do one run after another, in turn on each GPU."""
    os.environ["OMP_NUM_THREADS"] = "1"
    visible = os.environ.get(_VISIBLE_GPUS)
    gpus = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
    _OneGpuProcess.gpus = itertools.cycle(gpus)
    return ProcessPoolExecutor(count, _OneGpuContext(), _prepare_worker)


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@contextlib.contextmanager
def shared_gpus(log: Path) -> Iterator[None]:
    """An MPS daemon for all workers; without one they take turns on a GPU."""
    if shutil.which("nvidia-cuda-mps-control") is None:
        yield
        return
    loop = asyncio.new_event_loop()
    context = private_mps(MpsDaemon(log), print)
    loop.run_until_complete(context.__aenter__())
    try:
        yield
    finally:
        loop.run_until_complete(context.__aexit__(None, None, None))
        loop.close()


def main() -> None:
    arguments = parse_arguments()
    torch.set_float32_matmul_precision("high")
    sizes: dict[str, Any] = {
        "models": str(arguments.models),
        "device": arguments.device,
        "batching": arguments.batching,
    }
    arms = arguments.arms
    if arguments.trials:
        steps = arguments.steps or TRIAL_STEPS
        sizes |= {"steps": steps, "problems": arguments.problems or TRIAL_HELDOUT, "at_steps": []}
        sizes["first_problem"] = TRIAL_FIRST
        jobs = trial_jobs(arguments.settings, arms, sizes)
    else:
        steps = arguments.steps or EVALUATION_STEPS[-1]
        at_steps = [step for step in EVALUATION_STEPS if step <= steps]
        sizes |= {"steps": steps, "problems": arguments.problems or HELDOUT, "at_steps": at_steps}
        sizes["first_problem"] = 0
        rates = chosen_rates(read_jsonl(arguments.trials_log))
        jobs = jobs_of(arguments.settings, arms, range(arguments.seeds), sizes)
        for setting, arm, _, of_job in jobs.values():
            key = (setting, tuned_name(arm))
            if key not in rates:
                raise SystemExit(
                    f"{arguments.trials_log} has no trial of {key[1]} in {setting}; run with "
                    f"--trials --settings {setting} --arms {key[1]} first"
                )
            of_job["learning_rate"] = rates[key]
    sweep = Sweep(
        log=arguments.log,
        workers=arguments.workers,
        time_limit_s=arguments.time_limit_s,
        make_workers=workers,
        kind_of=lambda name: name.rpartition("/")[0],
    )
    with shared_gpus(arguments.log.parent / "mps.log"):
        runs = sweep.run(run_once, jobs)
    print(f"{len(runs)} of {len(jobs)} runs are in {arguments.log}")
    if sweep.failed:
        raise SystemExit(f"{len(sweep.failed)} runs failed: {', '.join(sweep.failed)}")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--trials", action="store_true", help="the tuning trials, not counted")
    parser.add_argument("--trials-log", type=Path, default=Path("runs/evidence/trials.jsonl"))
    parser.add_argument("--log", type=Path, default=Path("runs/evidence/runs.jsonl"))
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batching", choices=("static", "continuous"), default="static")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--steps", type=int, help="default: the protocol's budget")
    parser.add_argument("--problems", type=int, help="held-out; default: the protocol's")
    parser.add_argument("--time-limit-s", type=float, help="start no run that would end later")
    return parser.parse_args()


if __name__ == "__main__":
    main()
