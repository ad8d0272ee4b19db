"""Measures how far a student that decodes with keys and values in FP8 is from the learner's.

    python -m benchmarks.learning.kv_cache_gap --steps 4

A few steps of the shipped lab student with vLLM (`configs/lab-vllm.yaml`), once with a cache like
the model and once in FP8. Engine and learner compute in float32, so the cache is all that rounds.

Figures, for each case: ``gap_nats``, the mean difference between the learner's and the engine's
logprob of a sampled token, over tokens of all steps, ``largest_nats``, and ``accuracy``, held out,
of the student before the first step.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.learning.demo_seeds import run_demo
from benchmarks.lib.common import RESULTS, write_result
from qwen3_distill.recording.jsonl import read_jsonl

CASES = {"plain": (), "fp8_cache": ("generation.kv_cache_dtype=fp8",)}


def one_case(name: str, steps: int, problems: int, folder: Path) -> dict[str, Any]:
    overrides = (
        "student.model=models/lab/student",
        f"steps={steps}",
        "evaluation.every_steps=100000",
        f"evaluation.final_num_problems={problems}",
        *CASES[name],
    )
    summary = run_demo(0, folder / name, "configs/lab-vllm.yaml", overrides)
    records = read_jsonl(folder / name / "metrics.jsonl")
    return {
        "accuracy": summary["accuracy"]["before"]["value"],
        "steps": [
            {
                "tokens": record["tokens/trained"],
                "gap_nats": record["health/learner_vs_engine_abs_nats"],
                "largest_nats": record["health/learner_vs_engine_max_nats"],
            }
            for record in records
        ],
    }


def figures_of(cases: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the figures of all cases."""
    figures = dict[str, float]()
    for name, case in cases.items():
        steps = case["steps"]
        tokens = sum(step["tokens"] for step in steps)
        figures[f"{name}_gap_nats"] = (
            sum(step["gap_nats"] * step["tokens"] for step in steps) / tokens
        )
        figures[f"{name}_largest_nats"] = max(step["largest_nats"] for step in steps)
        figures[f"{name}_accuracy"] = case["accuracy"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("runs/kv-cache-gap"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    cases = {
        name: one_case(name, arguments.steps, arguments.problems, arguments.folder)
        for name in CASES
    }
    figures = figures_of(cases)
    print(figures)
    print(write_result("kv_cache_gap", figures, folder=arguments.results, cases=cases))


if __name__ == "__main__":
    main()
