"""Compares the demo with the sequential and the streaming loop, over several seeds.

    python -m benchmarks.speed.demo_pipelines --seeds 5

Every run is the command that a user types. The two loops alternate, so that a machine that slows
down slows both. Accuracies are held-out ones of the student after the run; the interval of a mean
over seeds is Student's t. Figures:
`sequential_accuracy`, `streaming_accuracy` (means, with `_low` and `_high`), `intervals_overlap` (1
or 0), `wall_ratio` (the loop's time, sequential over streaming; evaluations are in both) and
`command_wall_ratio` (the whole command, start of the processes included).
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.learning.demo_seeds import run_demo
from benchmarks.lib.common import write_result
from benchmarks.lib.statistics_of_seeds import mean_of_seeds

CONFIGS = {"sequential": "configs/demo.yaml", "streaming": "configs/demo-streaming.yaml"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11))
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-pipelines"))
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in CONFIGS}
    for seed in range(arguments.seeds):
        for kind, config in CONFIGS.items():
            runs[kind].append(run_demo(seed, arguments.folder / f"{kind}-{seed}", config))
    figures: dict[str, float] = {"seeds": arguments.seeds}
    bounds: dict[str, tuple[float, float]] = {}
    for kind, of_kind in runs.items():
        after = mean_of_seeds([run["accuracy"]["after"]["value"] for run in of_kind])
        assert after.low is not None
        assert after.high is not None
        bounds[kind] = after.low, after.high
        figures |= {
            f"{kind}_accuracy": after.mean,
            f"{kind}_accuracy_low": after.low,
            f"{kind}_accuracy_high": after.high,
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
