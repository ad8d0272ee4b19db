"""Measures how far `qwen3-distill plan` is off: predicted seconds beside measured ones.

    python -m benchmarks.speed.time_plan

compares with the committed H200 results and with public GB10 rows, without a GPU, and writes
`time_plan.json`. Results that fitted a share are listed and do not count.

    python -m benchmarks.speed.time_plan --fit

prints the shares that the fitting rows give, for `planning/rates.py`.

    python -m benchmarks.speed.time_plan --measure --device h200 --name h200_time_plan \
        --models models 'generation.environment={...}' 'scoring.environment={...}'

runs `qwen3-distill calibrate`, then steps of six configs with the real engines (`benchmarks.speed.
stages --parts opd`, minutes each), and compares them. None of them fitted anything. ``--models``
has `random-4B` and `random-8B` (`scripts/make_shape_model.py`). What was measured is kept after
every config; the same command goes on with those that are missing.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS, merge_result, write_result
from benchmarks.lib.gb10_public_rows import checked_rows
from benchmarks.lib.time_plan_case import CONFIG, Case, Row
from benchmarks.lib.time_plan_gb10 import gb10_head_costs, gb10_predictions, gb10_training
from benchmarks.lib.time_plan_rows import (
    committed_rows,
    fit,
    measured_rows,
    shared_prompt_gains,
)
from qwen3_distill.planning.peaks import DEVICES
from qwen3_distill.planning.rates import FITTED_ON


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One of the configs that are measured."""

    name: str
    case: Case
    sequences: int


def _setting(name: str, *overrides: str, **lengths: int) -> Setting:
    sequences = lengths.pop("sequences", 256)
    new_tokens = lengths.get("response_tokens", 512)
    case = Case(
        overrides=(f"prompts_per_step={sequences}", *overrides),
        max_new_tokens=new_tokens,
        recomputed_layers=lengths.pop("recomputed_layers", 0),
        **lengths,  # type: ignore[arg-type]
    )
    return Setting(name=name, case=case, sequences=sequences)


SETTINGS = (
    _setting("64 rollouts", "generation.max_sequences=64", sequences=64),
    _setting(
        "512 short answers", "generation.max_sequences=512", sequences=512, response_tokens=128
    ),
    _setting("long prompts", prompt_tokens=1024, response_tokens=256, sequences=128),
    _setting("long answers", response_tokens=1536, sequences=128),
    _setting("adapters beside the weights", "generation.adapters=swap", sequences=128),
    _setting(
        "everything recomputed, small micro-batches",
        "training.gradient_checkpointing='on'",
        "training.micro_batch_tokens=2560",
        sequences=128,
        recomputed_layers=36,
    ),
)
"""The six configs: each moves another term of the model."""


def compare() -> tuple[dict[str, float], dict[str, Any]]:
    """Compare with what is committed and public; return figures and details."""
    rows = committed_rows()
    gb10 = checked_rows()
    held_out = [row for row in rows if row.fits is None]
    unchanged = [row for row in held_out if row.changed is None]
    counted = [row["error_pct"] for row in gb10 if row["held_out"]]
    figures = {
        **error_figures(held_out),
        **{f"unchanged_{name}": value for name, value in error_figures(unchanged).items()},
        "gb10_public_error_pct": _mean_abs(counted),  # type: ignore[arg-type]
        "gb10_public_rows": len(counted),
        **gb10_head_costs(),
    }
    details = {
        "fitted_on": FITTED_ON,
        "held_out": [row.as_record() for row in held_out],
        "fitted": [row.as_record() for row in rows if row.fits is not None],
        "shared_prompts": shared_prompt_gains(),
        "gb10": gb10,
        "gb10_training": gb10_training(),
        "gb10_predicted": gb10_predictions(),
        "note": "Held-out rows of files that also fitted a share, or that repeat one, are of the "
        "same kind of card and models; h200_time_plan.json is of configs that nothing fitted.",
    }
    return figures, details


def error_figures(rows: Sequence[Row]) -> dict[str, float]:
    """Return the mean absolute errors of whole steps and of stages, in percent, and the worst."""
    steps = [100 * row.error() for row in rows if row.what.startswith("step")]
    stages = [100 * row.error() for row in rows if not row.what.startswith("step")]
    return {
        "time_plan_error_pct": _mean_abs(steps),
        "time_plan_worst_pct": max(map(abs, steps)),
        "time_plan_steps": len(steps),
        "time_plan_stage_error_pct": _mean_abs(stages),
        "time_plan_stages": len(stages),
    }


def _mean_abs(values: Sequence[float]) -> float:
    return sum(map(abs, values)) / len(values)


def measure(arguments: argparse.Namespace) -> Path:
    """Run every setting that is not there yet; return the result's file."""
    folder: Path = arguments.results
    file = folder / f"{arguments.name}.json"
    parts: dict[str, Any] = json.loads(file.read_text())["parts"] if file.is_file() else {}
    command = [sys.executable, "-m", "qwen3_distill.cli.main", "calibrate", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"the device was not calibrated: {done.stderr.strip()}")
    calibration = json.loads(done.stdout)
    print(done.stdout, flush=True)
    for number, setting in enumerate(SETTINGS, start=1):
        print(f"{number} of {len(SETTINGS)}: {setting.name}", flush=True)
        if setting.name in parts:
            continue
        parts[setting.name] = {"case": asdict(setting.case), "steps": _steps(setting, arguments)}
        rows = measured_rows(parts, device=arguments.device)
        figures = error_figures(rows)
        file = merge_result(
            arguments.name,
            figures,
            folder=folder,
            parts=parts,
            calibration=calibration,
            rows=[row.as_record() for row in rows],
        )
        print(json.dumps(figures), flush=True)
    return file


def _steps(setting: Setting, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Measure a setting's steps in a process of its own."""
    name = f"{arguments.name}-part"
    folder = Path("runs") / arguments.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").unlink(missing_ok=True)
    case = setting.case
    command = [sys.executable, "-m", "benchmarks.speed.stages", "--config", str(CONFIG)]
    command += ["--parts", "opd", "--name", name, "--results", str(folder)]
    command += ["--sequences", str(setting.sequences), "--opd-steps", "2"]
    command += ["--prompt-tokens", str(case.prompt_tokens)]
    command += ["--new-tokens", str(case.response_tokens)]
    command += [
        f"student.model={arguments.models / f'random-{case.student}'}",
        f"scoring.model={arguments.models / f'random-{case.teacher}'}",
        f"planning.prompt_tokens={case.prompt_tokens}",
        f"sampling.max_new_tokens={case.max_new_tokens}",
        f"objective={case.objective}",
        f"output_dir={folder / 'run'}",
        "scoring.readiness_tolerance_nats=3.0",
        *case.overrides,
        *arguments.overrides,
    ]
    if subprocess.run(command).returncode != 0:
        sys.exit(f"{setting.name}: not measured, the cause is above; what was measured is kept")
    return json.loads((folder / f"{name}.json").read_text())["parts"]["opd"]["steps"]


def main() -> None:
    arguments = parse()
    if arguments.fit:
        print(json.dumps(asdict(fit(committed_rows())), indent=2))
    elif arguments.measure:
        print(measure(arguments))
    else:
        figures, details = compare()
        print(write_result(arguments.name, figures, folder=arguments.results, **details))
        print(json.dumps(figures, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fit", action="store_true", help="print the shares")
    parser.add_argument("--measure", action="store_true", help="run the six configs on this GPU")
    known = [device.key for device in DEVICES]
    parser.add_argument("--device", choices=known, default="h200", help="the GPU, with --measure")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--name", default="time_plan", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="with --measure")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
