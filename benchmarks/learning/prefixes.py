"""Measures how training on prefixes changes accuracy and the end of responses.

    python -m benchmarks.learning.prefixes --seeds 2

The streaming demo with whole responses and with two kinds of prefix: harvested from running
rollouts at a step's deadline, and sampled up to a budget of tokens. Each is measured with several
shares of whole responses, from none on: only those show the student where to stop.

Figures, for each case (means over seeds, held out, after the last step): ``accuracy``,
``truncated`` (the share of responses that did not end within the limit of 80 tokens),
``mean_tokens`` of a response, and ``generated`` and ``trained`` tokens of the run.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.learning.demo_seeds import run_demo
from benchmarks.lib.common import RESULTS, write_result
from qwen3_distill.recording.jsonl import read_jsonl

CONFIG = "configs/demo-streaming.yaml"
STUDENT_AND_OBJECTIVE = (
    "student.model=models/lab/student",
    "objective={kind: sampled_reverse_kl, advantage_clip: 2.0, kl_baseline: {kind: top_k, k: 16}}",
)
"""Settings that the figures of docs/measured/prefixes.md were measured with."""
HARVEST = "pipeline.harvest={{deadline_s: 0.15, min_tokens: 8, full_length_fraction: {}}}"
BUDGET = "pipeline.prefix={{tokens: 12, full_length_fraction: {}}}"
CASES = {
    "whole": None,
    "harvest_full_0": HARVEST.format(0),
    "harvest_full_25": HARVEST.format(0.25),
    "prefix_full_0": BUDGET.format(0),
    "prefix_full_5": BUDGET.format(0.05),
    "prefix_full_25": BUDGET.format(0.25),
}


def one_run(case: str, seed: int, folder: Path) -> dict[str, Any]:
    setting = CASES[case]
    run_demo(seed, folder, CONFIG, [*STUDENT_AND_OBJECTIVE, *([setting] if setting else [])])
    last = read_jsonl(folder / "evaluations.jsonl")[-1]
    steps = read_jsonl(folder / "metrics.jsonl")
    return {
        "case": case,
        "seed": seed,
        "accuracy": last["accuracy"],
        "truncated": last["truncated_fraction"],
        "mean_tokens": last["mean_tokens"],
        "generated": sum(step["tokens/generated"] for step in steps),
        "trained": sum(step["tokens/trained"] for step in steps),
        "pieces": sum(step.get("staleness/pieces", 0) for step in steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--folder", type=Path, default=Path("runs/prefixes"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for case in arguments.cases:
            runs.append(one_run(case, seed, arguments.folder / f"{case}-{seed}"))
            print(json.dumps(runs[-1]), flush=True)
    figures = {
        f"{case}_{key}": statistics.fmean(run[key] for run in runs if run["case"] == case)
        for case in arguments.cases
        for key in ("accuracy", "truncated", "mean_tokens", "generated", "trained")
    }
    print(write_result("prefixes", figures, folder=arguments.results, runs=runs))


if __name__ == "__main__":
    main()
