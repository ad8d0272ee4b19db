"""Measures the accuracy of training on stale and on replayed rollouts, by objective.

    python -m benchmarks.learning.staleness --workers 16

The lab pair, the sequential loop, a constant learning rate. With staleness k the rollouts of step s
come from the weights of step max(0, s - k); all cases have the same number of optimizer steps:

- advantage `current`: log q - log pi_theta; `old`: log q - log mu, of the student that sampled.
- ratio `none`: 1; `truncated`: min(pi_theta / mu, 2); `ppo_clip`: PPO's surrogate, clip 0.2.

`current` with `truncated` is the package's default; at staleness 0 it is the reference. `current`
with `none` is an option of the package. At staleness 0 pi_theta is mu up to rounding, so the six
cases differ by chance alone: their spread is the noise of the table. They are run last.

With replay a batch is kept and followed by two optimizer steps, each on as many rollouts as a
batch has, drawn from all that are at most 16 optimizer steps old:

- `uniform`; `priority`: in proportion to priority^0.6; `decayed_priority`: the same with the
  priority times exp(-age / 4 steps). Importance weights are annealed from beta 0.4 to 1.
- `equal_generated`: as many batches as the reference, so twice its optimizer steps;
  `equal_learner`: half its batches, so the same number of steps. Lengths differ, so tokens are
  equal within a few per cent; the result has them.

Figures, for each case: held-out accuracy after the last step, of the newest weights (mean over
seeds), the ends of its 95% interval over seeds, and `_vs_reference`: the mean difference to the
reference, seed by seed, with its interval.

A finished run is on disk at once (`<folder>/runs.jsonl`); the same command continues after an
interruption.
"""

import argparse
import asyncio
import itertools
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from benchmarks.lib.common import RESULTS, write_result
from benchmarks.lib.staleness_parts import Advantage, Case, LaggedEngine, Ratio, adapted
from benchmarks.lib.statistics_of_seeds import MeanOfSeeds, mean_of_seeds
from benchmarks.lib.sweep import Record, Sweep
from qwen3_distill.config import EvaluationConfig, RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.evaluation.accuracy import evaluate
from qwen3_distill.pipeline.assembly.data import build_checker, build_problems
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.recording.jsonl import read_jsonl

STALENESS = (0, 4, 16, 1)
"""The most informative first: an interrupted sweep has these."""
CURVE_POINTS = 12
KEPT_OF_A_RUN = ("case", "seed", "accuracy", "generated_tokens", "learner_tokens", "cpu_s")

MEANS_OF_A_CASE = (
    "ratio_capped_fraction",
    "learner_vs_behavior_nats",
    "generated_tokens",
    "learner_tokens",
    "cpu_s",
)
REPLAY_MAX_AGE_STEPS = 16
UPDATES_PER_BATCH = 2

Law: TypeAlias = Literal["uniform", "priority", "decayed_priority"]
"""The law by which kept rollouts are drawn."""
Budget: TypeAlias = Literal["generated", "learner"]
"""The tokens that are as many as without replay; of the other kind there are twice or half."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that all runs of a sweep share."""

    steps: int
    rollouts_per_step: int
    learning_rate: float
    problems: int


@dataclass(frozen=True, kw_only=True)
class ReplayCase:
    """One row of the replay table."""

    law: Law
    budget: Budget

    @property
    def name(self) -> str:
        return f"replay_{self.law}_equal_{self.budget}"


CASES: dict[str, Case | ReplayCase] = {
    case.name: case
    for case in (
        *(
            Case(staleness=staleness, advantage=advantage, ratio=ratio)
            for staleness in STALENESS
            for advantage in get_args(Advantage)
            for ratio in get_args(Ratio)
        ),
        *(
            ReplayCase(law=law, budget=budget)
            for budget in get_args(Budget)
            for law in get_args(Law)
        ),
    )
}
REFERENCE = Case(staleness=0, advantage="current", ratio="truncated")
LAWS: dict[Law, str] = {
    "uniform": "{kind: uniform}",
    "priority": "{kind: proportional}",
    "decayed_priority": "{kind: proportional, age_decay_steps: 4}",
}


def run_case(name: str, seed: int, settings: dict[str, Any]) -> Record:
    """Train and evaluate once, in this process."""
    started, cpu_started = time.perf_counter(), time.process_time()
    case, sizes = CASES[name], Settings(**settings)
    with tempfile.TemporaryDirectory() as folder:
        config = case_config(case, sizes, seed, folder)
        assert config.evaluation is not None
        # In the loop the engine's weights are old; what is evaluated must be the newest.
        parts = train(config.model_copy(update={"evaluation": None}), case)
        accuracy = asyncio.run(accuracy_of(parts, config.evaluation, sizes.problems))
        steps = read_jsonl(Path(folder) / "metrics.jsonl")
    if isinstance(case, Case):
        require_exact_lag(steps, case.staleness)
    return {
        "case": name,
        "seed": seed,
        "accuracy": accuracy,
        "generated_tokens": sum(int(step["tokens/generated"]) for step in steps),
        "learner_tokens": sum(int(step["tokens/trained"]) for step in steps),
        "ratio_capped_fraction": _mean(steps, "health/ratio_capped_fraction"),
        "learner_vs_behavior_nats": _mean(steps, "health/learner_vs_engine_abs_nats"),
        "cpu_s": time.process_time() - cpu_started,
        "wall_s": time.perf_counter() - started,
        "curve": _curve([step for step in steps if step["tokens/generated"]]),
    }


def case_config(case: Case | ReplayCase, settings: Settings, seed: int, folder: str) -> RunConfig:
    """The demo's config with this sweep's sizes, without settings that blur the comparison."""
    replayed = isinstance(case, ReplayCase)
    steps = settings.steps
    if replayed and case.budget == "generated":
        steps *= UPDATES_PER_BATCH
    return load_config(
        "configs/demo.yaml",
        [
            f"seed={seed}",
            f"output_dir={folder}",
            f"steps={steps}",
            f"prompts_per_step={settings.rollouts_per_step}",
            f"training.optimizer.learning_rate={settings.learning_rate}",
            # Every step changes the weights by as much, so a lag means the same throughout the run.
            "training.optimizer.schedule={kind: constant}",
            "student.model=models/lab/student",
            # A baseline cancels in expectation only under the right ratio.
            "objective={kind: sampled_reverse_kl, advantage_clip: 2.0}",
            f"checkpoint.every_steps={steps}",
            f"logging.rollouts_every_steps={steps}",
            "logging.tensorboard=false",
            *([replay_section(case, settings, steps)] if replayed else []),
        ],
    )


def replay_section(case: ReplayCase, settings: Settings, steps: int) -> str:
    """The override for replay: a buffer so large that it drops rollouts by age only."""
    longest_tokens = 128  # a prompt of the task and its answer
    kept_batches = REPLAY_MAX_AGE_STEPS // UPDATES_PER_BATCH + 2
    return (
        f"replay={{capacity_tokens: {kept_batches * settings.rollouts_per_step * longest_tokens}, "
        f"max_age_steps: {REPLAY_MAX_AGE_STEPS}, updates_per_batch: {UPDATES_PER_BATCH}, "
        f"law: {LAWS[case.law]}, beta_steps: {steps}}}"
    )


def train(config: RunConfig, case: Case | ReplayCase) -> Parts:
    """Run the pipeline with the case's parts; return them, with the trained student."""
    used: list[Parts] = []

    def adapt(parts: Parts) -> Parts:
        used.append(adapted(parts, case) if isinstance(case, Case) else parts)
        return used[0]

    run(config, SilentReporter(), print, adapt)
    return used[0]


async def accuracy_of(parts: Parts, evaluation: EvaluationConfig, problems: int) -> float:
    """Held-out accuracy of the learner's newest weights, without the engine's lag."""
    engine = parts.engine.inner if isinstance(parts.engine, LaggedEngine) else parts.engine
    await engine.load(parts.learner.version, parts.channel)
    result = await evaluate(
        engine,
        build_problems(parts.config.student, evaluation, parts.text)(problems),
        build_checker(evaluation.verifier, parts.text),
        sampling=evaluation.sampling,
        samples_per_problem=evaluation.samples_per_problem,
        seed=0,  # the same random numbers in every run: differences are less noisy
    )
    return result.accuracy


def require_exact_lag(steps: Sequence[Record], staleness: int) -> None:
    """Raise unless every step trained on rollouts of exactly the case's lag."""
    lags = [int(step["weights/lag_steps"]) for step in steps]
    expected = [min(index, staleness) for index in range(len(steps))]
    if lags != expected:
        raise RuntimeError(f"lags were {lags}, expected {expected}")


def _mean(steps: Sequence[Record], key: str) -> float:
    return sum(step[key] for step in steps) / len(steps)


def _curve(steps: Sequence[Record]) -> list[float]:
    """Accuracy of the training rollouts, which have the case's lag, in equal parts of the run."""
    edges = [round(len(steps) * part / CURVE_POINTS) for part in range(CURVE_POINTS + 1)]
    parts = [steps[start:stop] for start, stop in itertools.pairwise(edges)]
    return [round(_mean(part, "rollout/accuracy"), 4) for part in parts if part]


def jobs_of(settings: Settings, seeds: int, names: Sequence[str]) -> dict[str, list[Any]]:
    """All cases of the first seed, then of the next; the cases that show the noise come last."""
    fresh = {n for n, case in CASES.items() if isinstance(case, Case) and case.staleness == 0}
    noise = fresh - {REFERENCE.name}
    first = [(name, seed) for seed in range(seeds) for name in names if name not in noise]
    last = [(name, seed) for seed in range(seeds) for name in names if name in noise]
    return {f"{name}/seed-{seed}": [name, seed, asdict(settings)] for name, seed in [*first, *last]}


def summarize(runs: Sequence[Record]) -> list[Record]:
    """One record per case that has runs, with intervals over seeds."""
    by_case: dict[str, dict[int, Record]] = {}
    for record in runs:
        by_case.setdefault(record["case"], {})[record["seed"]] = record
    reference = {seed: r["accuracy"] for seed, r in by_case.get(REFERENCE.name, {}).items()}
    rows: list[Record] = []
    for name, of_seed in by_case.items():
        accuracy = {seed: record["accuracy"] for seed, record in of_seed.items()}
        paired = [accuracy[seed] - reference[seed] for seed in sorted(accuracy.keys() & reference)]
        curves = [record["curve"] for record in of_seed.values()]
        rows.append(
            {
                "name": name,
                **asdict(CASES[name]),
                "accuracy": asdict(mean_of_seeds(list(accuracy.values()))),
                "vs_reference": asdict(mean_of_seeds(paired)) if paired else None,
                **{
                    key: sum(record[key] for record in of_seed.values()) / len(of_seed)
                    for key in MEANS_OF_A_CASE
                },
                "curve": [round(sum(c) / len(c), 4) for c in zip(*curves, strict=True)],
            }
        )
    return rows


def figures_of(rows: Sequence[Record]) -> dict[str, float]:
    """Figures by name; intervals only with two seeds or more."""
    figures: dict[str, float] = {}
    for row in rows:
        for suffix, key in (("", "accuracy"), ("_vs_reference", "vs_reference")):
            if row[key] is None:
                continue
            of_seeds = MeanOfSeeds(**row[key])
            figures[f"{row['name']}{suffix}"] = of_seeds.mean
            if of_seeds.low is not None and of_seeds.high is not None:
                figures[f"{row['name']}{suffix}_low"] = of_seeds.low
                figures[f"{row['name']}{suffix}_high"] = of_seeds.high
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="one core each")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rollouts-per-step", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--problems", type=int, default=500, help="held-out, of the last step")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--time-limit-s", type=float, help="start no run that would end later")
    parser.add_argument("--folder", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the summary")
    arguments = parser.parse_args()
    settings = Settings(
        steps=arguments.steps,
        rollouts_per_step=arguments.rollouts_per_step,
        learning_rate=arguments.learning_rate,
        problems=arguments.problems,
    )
    sweep = Sweep(
        log=arguments.folder / "runs.jsonl",
        workers=arguments.workers,
        time_limit_s=arguments.time_limit_s,
    )
    jobs = jobs_of(settings, arguments.seeds, arguments.cases)
    runs = sweep.run(run_case, jobs)
    if not runs:
        raise SystemExit("no run was finished")
    rows = summarize(runs)
    path = write_result(
        "staleness",
        figures_of(rows),
        folder=arguments.results,
        settings=asdict(settings),
        missing_runs=sorted(jobs.keys() - {record["job"] for record in runs}),
        cases=[row for row in rows if "staleness" in row],
        replay_cases=[row for row in rows if "law" in row],
        runs=[{key: record[key] for key in KEPT_OF_A_RUN} for record in runs],
    )
    print(path)
    if sweep.failed:
        raise SystemExit(f"{len(sweep.failed)} runs failed: {', '.join(sweep.failed)}")


if __name__ == "__main__":
    main()
