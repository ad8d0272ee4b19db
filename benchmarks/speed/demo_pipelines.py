"""The demo with turns and streaming, several seeds of each, each as the command a user runs.

    python -m benchmarks.speed.demo_pipelines --seeds 5

The two take turns, so that a machine that slows down slows both. Accuracies are of the student
after the run, held out; the interval of a mean over seeds is Student's t. Figures:
`sequential_accuracy`, `streaming_accuracy` (means, with `_low` and `_high`), `intervals_overlap` (1
or 0), `wall_ratio` (the loop's time, sequential over streaming; evaluations are in both) and
`command_wall_ratio` (the whole command, start of the processes included).
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.learning.demo_seeds import run_demo
from benchmarks.lib.common import write_result

CONFIGS = {"sequential": "configs/demo.yaml", "streaming": "configs/demo-streaming.yaml"}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t by the number of values: the 97.5th percentile, one degree of freedom fewer."""


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95% interval over seeds."""
    mean = statistics.fmean(values)
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(T_95))
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-pipelines"))
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in CONFIGS}
    for seed in range(arguments.seeds):
        for kind, config in CONFIGS.items():
            runs[kind].append(run_demo(seed, arguments.folder / f"{kind}-{seed}", config))
    figures: dict[str, float] = {"seeds": arguments.seeds}
    bounds: dict[str, tuple[float, float]] = {}
    for kind, of_kind in runs.items():
        after = [run["accuracy"]["after"]["value"] for run in of_kind]
        mean, low, high = mean_interval(after)
        bounds[kind] = low, high
        figures |= {
            f"{kind}_accuracy": mean,
            f"{kind}_accuracy_low": low,
            f"{kind}_accuracy_high": high,
            f"{kind}_wall_s": statistics.fmean(run["wall_s"]["total"] for run in of_kind),
            f"{kind}_command_s": statistics.fmean(run["command_wall_s"] for run in of_kind),
        }
    (low, high), (other_low, other_high) = bounds.values()
    figures["intervals_overlap"] = float(low <= other_high and other_low <= high)
    figures["wall_ratio"] = figures["sequential_wall_s"] / figures["streaming_wall_s"]
    figures["command_wall_ratio"] = figures["sequential_command_s"] / figures["streaming_command_s"]
    print(write_result("demo_pipelines", figures, runs=runs))


if __name__ == "__main__":
    main()
