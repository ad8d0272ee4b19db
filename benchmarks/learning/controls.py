"""Compares the real teacher with shuffled scores and with none, on the same budget.

    python -m benchmarks.learning.controls --seeds 3 --jobs 1

- `real`: the demo without a baseline, which would bring the real candidates into the controls.
- `shuffled`: the teacher's scores, permuted over the tokens of a step.
- `constant`: every token's advantage is -0.5, whatever the teacher says (arXiv 2608.31046 reports
  that a constant can do as well as a teacher; on this task it is measured here).

Figures: final held-out accuracy, mean over seeds, and `before`.
"""

import argparse
import dataclasses
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lib.common import write_result
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.ports import TeacherScorer
from qwen3_distill.recording.console import make_reporter
from qwen3_distill.scoring.views import SameView
from qwen3_distill.scoring.wrapper import TeacherWrapper
from qwen3_distill.types import (
    Rollout,
    ScoredRollout,
    ScoreResult,
    ScoringJob,
    TeacherScore,
)
from qwen3_distill.utils.seeds import derive_seed

CONSTANT_ADVANTAGE_NATS = -0.5


class ShuffledTeacher(TeacherWrapper[TeacherScorer]):
    """A real teacher whose scores are permuted over the tokens of a step."""

    def __init__(self, teacher: TeacherScorer, seed: int) -> None:
        super().__init__(teacher)
        self._seed = seed
        self._calls = 0

    @property
    def teacher_id(self) -> str:
        return f"shuffled {self.inner.teacher_id}"

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        results = await self.inner.score(jobs)
        scores = [result for result in results if isinstance(result, TeacherScore)]
        rng = np.random.default_rng(derive_seed(self._seed, "shuffle", self._calls))
        self._calls += 1
        shuffled = rng.permutation(np.concatenate([score.logprobs for score in scores]))
        edges = np.cumsum([score.logprobs.size for score in scores])[:-1]
        return [
            TeacherScore(teacher_id=self.teacher_id, logprobs=part)
            for part in np.split(shuffled, edges)
        ]


class ConstantView(SameView):
    """Scores that make every advantage the same number, on-policy."""

    def scored(self, rollout: Rollout, result: ScoreResult) -> ScoredRollout:
        score = TeacherScore(
            teacher_id=f"constant {CONSTANT_ADVANTAGE_NATS}",
            logprobs=rollout.behavior_logprobs + CONSTANT_ADVANTAGE_NATS,
        )
        return ScoredRollout(rollout=rollout, score=score)


def real(parts: Parts) -> Parts:
    return parts


def shuffled(parts: Parts) -> Parts:
    teacher = ShuffledTeacher(parts.required_teacher, parts.config.seed)
    return dataclasses.replace(parts, teacher=teacher)


def constant(parts: Parts) -> Parts:
    return dataclasses.replace(parts, view=ConstantView())


ARMS: dict[str, Callable[[Parts], Parts]] = {
    "real": real,
    "shuffled": shuffled,
    "constant": constant,
}


def run_arm(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Run one arm once; return the summary."""
    torch.set_num_threads(1)  # several runs share the cores
    config = arm_config(name, seed, folder)
    shutil.rmtree(config.output_path, ignore_errors=True)
    print(f"== {name}, seed {config.seed}", flush=True)
    summary = run(config, make_reporter(config.steps), print, adapt=ARMS[name])
    assert summary is not None
    return {"arm": name, "seed": config.seed, **summary}


def arm_config(name: str, seed: int, folder: Path) -> RunConfig:
    """The demo's config with the sampled objective, without what the arms differ in."""
    return load_config(
        "configs/demo.yaml",
        [
            f"seed={seed}",
            f"output_dir={folder / name / str(seed)}",
            "evaluation.teacher=false",
            "student.model=models/lab/student",
            # A baseline would bring the real candidates back into the controls.
            "objective={kind: sampled_reverse_kl, advantage_clip: 2.0}",
            "steps=160",
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one core each")
    parser.add_argument("--folder", type=Path, default=Path("runs/controls"))
    arguments = parser.parse_args()
    work = [(name, seed, arguments.folder) for seed in range(arguments.seeds) for name in ARMS]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        runs = pool.starmap(run_arm, work, chunksize=1)

    def mean(arm: str, when: str) -> float:
        values = [r["accuracy"][when]["value"] for r in runs if r["arm"] == arm]
        return sum(values) / len(values)

    figures = {name: mean(name, "after") for name in ARMS}
    path = write_result(
        "controls",
        {**figures, "before": mean("real", "before"), "num_seeds": arguments.seeds},
        runs=runs,
    )
    print(path)


if __name__ == "__main__":
    main()
