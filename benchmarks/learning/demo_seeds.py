"""Runs the demo with several seeds, each as the command that a user types.

    python -m benchmarks.learning.demo_seeds --seeds 5

Figures: `num_seeds`, `max_before` and `min_after` (held-out accuracy of the student at temperature
1), `max_greedy_before` and `min_greedy_after` (at temperature 0), `teacher` (the lowest measured at
temperature 1), `max_wall_s` (the whole command: start of the process to the report).
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.common import write_result


def run_demo(
    seed: int, folder: Path, config: str = "configs/demo.yaml", overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the demo in a process of its own; return its summary and wall seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, "-m", "qwen3_distill.cli.main", "run"),
            *("--config", config, f"seed={seed}", f"output_dir={folder}", *overrides),
        ],
        check=True,
    )
    wall_s = time.perf_counter() - started
    return {
        "seed": seed,
        "command_wall_s": wall_s,
        **json.loads((folder / "summary.json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-seeds"))
    arguments = parser.parse_args()
    runs = [run_demo(seed, arguments.folder / str(seed)) for seed in range(arguments.seeds)]
    before = [run["accuracy"]["before"]["value"] for run in runs]
    after = [run["accuracy"]["after"]["value"] for run in runs]
    path = write_result(
        "demo_seeds",
        {
            "num_seeds": len(runs),
            "max_before": max(before),
            "min_after": min(after),
            "mean_after": sum(after) / len(after),
            "max_greedy_before": max(run["second_accuracy"]["before"]["value"] for run in runs),
            "min_greedy_after": min(run["second_accuracy"]["after"]["value"] for run in runs),
            "teacher": min(run["accuracy"]["teacher"]["value"] for run in runs),
            "max_wall_s": max(run["command_wall_s"] for run in runs),
        },
        runs=runs,
    )
    print(path)


if __name__ == "__main__":
    main()
