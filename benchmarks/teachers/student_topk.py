"""Distils the demo's student over its own most likely tokens, and over its teacher's.

    python -m benchmarks.teachers.student_topk --seeds 5 --jobs 2

Every run is the demo's, as a command of its own; only `objective.k` and `objective.support` differ.
The same command goes on after an interruption. Another run has a teacher that reads the same tokens
through `scoring.tokenizer: own`, and is compared with one whose teacher reads them as they are.

Figures, added to results/teachers.json: `student_topk_before` and `student_topk_after` (mean
held-out accuracy at temperature 1 over the seeds, 16 of the student's tokens; with `_low` and
`_high`, the 95% interval), `teacher_topk_after` (16 of the teacher's), `student_top2_after` and
`teacher_top2_after` (2 candidates), `student_topk_seeds`; `same_view_max_abs_diff`, the largest
difference of any weight of the two students whose teachers read the same tokens.
"""

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.learning.demo_seeds import run_demo
from benchmarks.lib.common import RESULTS, merge_result
from benchmarks.lib.statistics_of_seeds import mean_of_seeds

ARMS: Mapping[str, dict[str, Any]] = {
    "student_topk": {"k": 16, "support": "student"},
    "teacher_topk": {"k": 16, "support": "teacher"},
    "student_top2": {"k": 2, "support": "student"},
    "teacher_top2": {"k": 2, "support": "teacher"},
}
SAMPLED = "objective={kind: sampled_reverse_kl, advantage_clip: 2.0}"


def finished(seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the summary of a run that is over, or make the run."""
    done = folder / "done.json"
    if not done.is_file():
        record = run_demo(seed, folder, overrides=overrides)
        done.write_text(json.dumps(record))
    return json.loads(done.read_text())


def arm_runs(folder: Path, seeds: int, jobs: int) -> dict[str, list[dict[str, Any]]]:
    """Make every arm's runs, ``jobs`` at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        started = {
            name: [
                pool.submit(
                    finished,
                    seed,
                    folder / name / str(seed),
                    [f"objective={{kind: top_k, k: {arm['k']}, support: {arm['support']}}}"],
                )
                for seed in range(seeds)
            ]
            for name, arm in ARMS.items()
        }
        return {name: [run.result() for run in runs] for name, runs in started.items()}


def same_view_difference(folder: Path) -> float:
    """Return the largest difference of the weights after two runs of 20 steps."""
    students = []
    for name, tokenizer in (("shared", "same"), ("own", "own")):
        overrides = [SAMPLED, "steps=20", f"scoring.tokenizer={tokenizer}", "evaluation=null"]
        shutil.rmtree(folder / name, ignore_errors=True)
        run_demo(0, folder / name, overrides=overrides)
        students.append(load_file(folder / name / "student" / "model.safetensors"))
    shared, own = students
    return max(float((shared[key] - own[key]).abs().max()) for key in shared)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/teachers/student-topk"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of teachers.json")
    arguments = parser.parse_args()
    if arguments.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    runs = arm_runs(arguments.folder, arguments.seeds, arguments.jobs)
    figures: dict[str, float] = {"student_topk_seeds": arguments.seeds}
    for name, records in runs.items():
        after = mean_of_seeds([record["accuracy"]["after"]["value"] for record in records])
        figures |= after.figures(f"{name}_after")
    before = [record["accuracy"]["before"]["value"] for record in runs["student_topk"]]
    figures["student_topk_before"] = sum(before) / len(before)
    figures["same_view_max_abs_diff"] = same_view_difference(arguments.folder / "same-view")
    print(json.dumps(figures, indent=2))
    print(merge_result("teachers", figures, folder=arguments.out, student_topk_runs=runs))


if __name__ == "__main__":
    main()
