"""Distils the lab pair with the real engines and compares it with the embedded ones.

    python -m benchmarks.robustness.gpu_check --config configs/lab-vllm.yaml generation.python=... \
        scoring.python=... training.python=...

Runs the config as `qwen3-distill run` does, in a new folder, and compares the student's held-out
accuracy with the runs of the embedded engines in `benchmarks/results/lab_seeds.json`: their
95% intervals must overlap. Exit status 1 where they do not.

Figures: accuracy `before`, `after` and of the `teacher`; `embedded_after_low`, the lower end of the
lowest embedded run's interval; `wall_s` from the start of the first engine to the report;
`peak_gib` of the device's memory, as the driver counts it. With `--suites`, JUnit files of the
contract suites run before, also `contract_passed`, `contract_failed` and `contract_skipped`.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS, write_result
from benchmarks.lib.device_memory import PeakMemory
from benchmarks.lib.junit_outcomes import outcomes
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.console import make_reporter


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/lab-vllm.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--suites", type=Path, nargs="*", default=[], help="JUnit files")
    parser.add_argument("--name", default="gpu_check", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    folder = f"{config.output_dir}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = config.model_copy(update={"output_dir": folder})
    lowest = lowest_embedded_interval(RESULTS / "lab_seeds.json")
    absent = [str(file) for file in arguments.suites if not file.is_file()]
    if absent:
        sys.exit(f"--suites: no {', '.join(absent)}; pytest writes them with --junit-xml")
    suites = outcomes(arguments.suites)
    summary, wall_s, peak_gib = distil(config)
    accuracy = summary["accuracy"]
    path = write_result(
        arguments.name,
        {
            "before": accuracy["before"]["value"],
            "after": accuracy["after"]["value"],
            "teacher": accuracy["teacher"]["value"],
            "embedded_after_low": lowest,
            "wall_s": wall_s,
            "peak_gib": peak_gib,
            **{
                f"contract_{outcome}": sum(suite[outcome] for suite in suites.values())
                for outcome in ("passed", "failed", "skipped")
                if suites
            },
        },
        folder=arguments.results,
        summary=summary,
        contract=suites,
    )
    print(path)
    if accuracy["after"]["ci_high"] < lowest:
        sys.exit(
            f"the student got {accuracy['after']['value']:.1%}; embedded runs of the same config "
            f"get {lowest:.1%} at least"
        )


def lowest_embedded_interval(file: Path) -> float:
    """Lower end of the 95% interval of the least accurate embedded run."""
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    return min(one["accuracy"]["after"]["ci_low"] for one in runs)


def distil(config: RunConfig) -> tuple[dict[str, Any], float, float]:
    """Run; return the summary, the seconds and the device's peak memory in GiB."""
    began = time.perf_counter()
    with PeakMemory() as memory:
        summary = run(config, make_reporter(config.steps), report_warning)
    if summary is None:
        sys.exit("interrupted")
    return summary, time.perf_counter() - began, memory.peak_gib


def report_warning(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
