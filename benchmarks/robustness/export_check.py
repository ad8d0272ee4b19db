"""Measures how much the logits of a run's student change in a GGUF file.

    python -m benchmarks.robustness.export_check --run runs/demo

Exports the student as f16 and as q8_0 into a temporary folder; each file is read back by
transformers and compared with ``student/`` on the same tokens. Without ``--run`` the config is run
first, in a temporary folder (``--config configs/demo.yaml steps=3``). Exit status 1 where float16
changes a logit by more than it may.

Figures: ``gguf_f16_max_abs_logit_diff`` and ``gguf_q8_0_max_abs_logit_diff``, the largest absolute
differences of logits; ``..._same_top_fraction``, the share of positions with the same most likely
token. Other figures that the result has already stay in it.
"""

import argparse
import importlib.metadata
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS, write_result
from qwen3_distill.config.load import load_config
from qwen3_distill.export.export import ExportRequest, export_run
from qwen3_distill.export.gguf_check import F16_TOLERANCE
from qwen3_distill.export.gguf_file import Quant
from qwen3_distill.export.target import RECORD
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.console import make_reporter

_QUANTS: tuple[Quant, ...] = ("f16", "q8_0")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a finished run's folder")
    parser.add_argument("--config", default="configs/demo.yaml", help="of the run made without it")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--name", default="export", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = options.run or _make_run(options, Path(scratch) / "run")
        figures: dict[str, float] = {}
        for quant in _QUANTS:
            figures |= _export(folder, quant, Path(scratch) / quant)
        details = _run_details(folder)
    path = _merge_result(options, figures, details)
    print(json.dumps(figures, indent=2))
    print(path)
    if figures["gguf_f16_max_abs_logit_diff"] > F16_TOLERANCE:
        sys.exit(1)


def _make_run(options: argparse.Namespace, folder: Path) -> Path:
    config = load_config(options.config, [*options.overrides, f"output_dir={folder}"])
    if run(config, make_reporter(config.steps), print) is None:
        sys.exit("the run was stopped")
    return folder


def _export(folder: Path, quant: Quant, out: Path) -> dict[str, float]:
    request = ExportRequest(run=folder, to="gguf", quant=quant, out=out, max_logit_diff=math.inf)
    record: dict[str, Any] = json.loads((export_run(request, print) / RECORD).read_text())
    return record["figures"]


def _run_details(folder: Path) -> dict[str, Any]:
    """Which student it was, and who wrote the file."""
    config = json.loads((folder / "config.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "student": config["student"]["model"],
        "steps": summary["steps"],
        "gguf": importlib.metadata.version("gguf"),
    }


def _merge_result(
    options: argparse.Namespace, figures: dict[str, float], details: dict[str, Any]
) -> Path:
    """Write the result with the figures and details of others that it has already."""
    file: Path = options.results / f"{options.name}.json"
    earlier: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    written = ("name", "command", "commit", "machine", "versions", "figures", *details)
    others = {key: value for key, value in earlier.items() if key not in written}
    return write_result(
        options.name,
        {**earlier.get("figures", {}), **figures},
        folder=options.results,
        **others,
        **details,
    )


if __name__ == "__main__":
    main()
