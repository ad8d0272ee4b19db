"""Measures what FP8 in frozen layers does to the accuracy of the lab student, over seeds.

    python -m benchmarks.learning.fp8_accuracy --seeds 5 --jobs 2

The demo with adapters on all linear layers, its frozen layers as loaded, and in FP8 for the
gradient that passes through them, with the same seeds. It runs on a CPU, which sums in float32; a
GPU sums the products with fewer bits.

Figures, for each case: the mean held-out ``accuracy`` after the last step at temperature 1 with its
95% interval (``_low``, ``_high``), the same at temperature 0 (``greedy``), and the mean difference
to the layers as loaded, paired by seed, with its interval (``difference``).
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.learning.demo_seeds import run_demo
from benchmarks.lib.common import RESULTS, write_result
from benchmarks.lib.statistics_of_seeds import mean_of_seeds

TUNING = (
    "training.tuning={kind: lora, rank: 16, alpha: 32}",
    "training.optimizer.learning_rate=4e-3",
)
CASES = ("as_loaded", "fp8_backward")


def one_run(case: str, seed: int, folder: Path) -> dict[str, Any]:
    run = run_demo(
        seed, folder / f"{case}-{seed}", overrides=[*TUNING, f"training.base_precision={case}"]
    )
    result = {
        "case": case,
        "seed": seed,
        "accuracy": run["accuracy"]["after"]["value"],
        "greedy": run["second_accuracy"]["after"]["value"],
    }
    print(result, flush=True)
    return result


def figures_of(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the figures of all runs, which are in the order of their seeds."""
    figures: dict[str, float] = {"seeds": len(runs) // len(CASES)}
    accuracies = {case: [run["accuracy"] for run in runs if run["case"] == case] for case in CASES}
    for case, values in accuracies.items():
        figures |= mean_of_seeds(values).figures(f"{case}_accuracy")
        greedy = [run["greedy"] for run in runs if run["case"] == case]
        figures[f"{case}_greedy"] = mean_of_seeds(greedy).mean
        if case != CASES[0]:
            pairs = zip(values, accuracies[CASES[0]], strict=True)
            differences = mean_of_seeds([ours - exact for ours, exact in pairs])
            figures |= differences.figures(f"{case}_difference")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--folder", type=Path, default=Path("runs/fp8-accuracy"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    if arguments.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(arguments.jobs) as pool:
        started = [
            pool.submit(one_run, case, seed, arguments.folder)
            for seed in range(arguments.seeds)
            for case in CASES
        ]
        runs = [each.result() for each in started]
    figures = figures_of(runs)
    print(write_result("fp8_accuracy", figures, folder=arguments.results, runs=runs))


if __name__ == "__main__":
    main()
