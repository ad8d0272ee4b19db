"""Distils the lab student from a lab teacher that has another tokenizer, with several seeds.

    python -m benchmarks.teachers.cross_tokenizer --folder runs/cross-tokenizer
    python -m benchmarks.teachers.cross_tokenizer --seeds 1 --steps 4 --teacher-steps 50

First it trains the teacher (minutes on two CPU cores). The same command goes on where it was
interrupted; a finished run is not repeated.

Figures in ``teachers.json``: `cross_tokenizer_before`, `cross_tokenizer_after` (means of held-out
accuracy over the seeds, at temperature 1; `cross_tokenizer_greedy_...` without sampling),
`cross_tokenizer_after_min`, `alignment_ms_per_step` and `alignment_percent_of_step` (host time of
the view, of the wall time of a step).
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from benchmarks.lib.common import RESULTS, merge_result
from benchmarks.lib.statistics_of_seeds import mean_of_seeds
from benchmarks.teachers.merged_pairs import make_teacher
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.console import PlainReporter
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.scoring.views import TeacherView
from qwen3_distill.types import (
    AlignedRollout,
    ModelIdentity,
    Rollout,
    ScoredRollout,
    ScoreFailure,
    ScoreResult,
    ScoringJob,
    UnalignedRollout,
)

TIMES = "alignment.json"


class TimedView(TeacherView):
    """A `TeacherView` that adds up the host time of another one."""

    def __init__(self, inner: TeacherView) -> None:
        self._inner = inner
        self.seconds = 0.0

    def check(self, student: ModelIdentity, teacher: ModelIdentity) -> None:
        self._inner.check(student, teacher)

    def job(self, rollout: Rollout) -> ScoringJob | UnalignedRollout:
        return self.jobs([rollout])[0]

    def jobs(self, rollouts: Sequence[Rollout]) -> Sequence[ScoringJob | UnalignedRollout]:
        started = time.perf_counter()
        found = self._inner.jobs(rollouts)
        self.seconds += time.perf_counter() - started
        return found

    def scored(
        self, rollout: Rollout, result: ScoreResult
    ) -> ScoredRollout | AlignedRollout | ScoreFailure:
        started = time.perf_counter()
        found = self._inner.scored(rollout, result)
        self.seconds += time.perf_counter() - started
        return found


def config_of(arguments: argparse.Namespace, seed: int) -> RunConfig:
    """Return the demo's config with the lab student, spans and the other teacher."""
    folder: Path = arguments.folder
    changes: dict[str, Any] = {
        "output_dir": folder / f"seed-{seed}",
        "seed": seed,
        "steps": arguments.steps,
        "student.model": arguments.student,
        "scoring.model": folder / "teacher",
        "scoring.tokenizer": "own",
        "objective": "{kind: sampled_reverse_kl, advantage_clip: 2.0}",
        "evaluation.teacher": "false",
        "evaluation.num_problems": arguments.problems,
        "evaluation.final_num_problems": arguments.problems,
    }
    return load_config("configs/demo.yaml", [f"{key}={value}" for key, value in changes.items()])


def run_seed(config: RunConfig) -> dict[str, float]:
    """Run to the end; return accuracies and the host time of alignment."""
    timed: list[TimedView] = []

    def with_timer(parts: Parts) -> Parts:
        timed.append(TimedView(parts.view))
        return dataclasses.replace(parts, view=timed[0])

    reporter = PlainReporter(config.steps, 0, Console())
    summary = run(config, reporter, lambda text: print(f"note: {text}"), with_timer)
    if summary is None:
        sys.exit("interrupted; the same command goes on")
    folder = config.output_path
    steps = read_jsonl(folder / "metrics.jsonl")
    if timed:
        counted = [step["time/step_s"] for step in steps]
        record = {"align_s": timed[0].seconds, "step_s": sum(counted), "steps": len(counted)}
        (folder / TIMES).write_text(json.dumps(record) + "\n")
    spent = json.loads((folder / TIMES).read_text())
    return {
        "before": summary["accuracy"]["before"]["value"],
        "after": summary["accuracy"]["after"]["value"],
        "greedy_before": summary["second_accuracy"]["before"]["value"],
        "greedy_after": summary["second_accuracy"]["after"]["value"],
        "tokens_per_span": fmean(step["score/tokens_per_span"] for step in steps),
        "unaligned_tokens": sum(step["tokens/unaligned"] for step in steps),
        "alignment_ms_per_step": 1000 * spent["align_s"] / spent["steps"],
        "alignment_percent_of_step": 100 * spent["align_s"] / spent["step_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--teacher-steps", type=int, default=900)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--student", default="models/lab/student")
    parser.add_argument("--folder", type=Path, default=Path("runs/cross-tokenizer"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of teachers.json")
    arguments = parser.parse_args()
    make_teacher(arguments.folder / "teacher", arguments.teacher_steps)
    runs = [run_seed(config_of(arguments, seed)) for seed in range(arguments.seeds)]
    after = mean_of_seeds([found["after"] for found in runs])
    figures = {
        "cross_tokenizer_before": fmean(found["before"] for found in runs),
        "cross_tokenizer_after": after.mean,
        "cross_tokenizer_after_min": min(found["after"] for found in runs),
        "cross_tokenizer_greedy_before": fmean(found["greedy_before"] for found in runs),
        "cross_tokenizer_greedy_after": fmean(found["greedy_after"] for found in runs),
        "cross_tokenizer_seeds": len(runs),
        "alignment_ms_per_step": fmean(found["alignment_ms_per_step"] for found in runs),
        "alignment_percent_of_step": fmean(found["alignment_percent_of_step"] for found in runs),
    }
    if after.low is not None and after.high is not None:
        figures |= {
            "cross_tokenizer_after_low": after.low,
            "cross_tokenizer_after_high": after.high,
        }
    print(json.dumps(figures, indent=2))
    print(merge_result("teachers", figures, folder=arguments.out, cross_tokenizer_runs=runs))


if __name__ == "__main__":
    main()
