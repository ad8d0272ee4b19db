"""Whether other programs read a run's student as this one does.

    python -m benchmarks.robustness.student_readers --run runs/demo \
        --reader tf4=$(python3 src/qwen3_distill/environments/make.py transformers4-cpu)

``NAME=PYTHON`` is an interpreter with transformers; its name begins the figures:
``tf4_max_abs_logit_diff``, the largest absolute difference of its logits from those here, and
``tf4_same_token_ids``, whether its tokenizer gives the same token ids (1 or 0). They are added to
the result; its other figures stay. Exit status 1 where a reader differs by more than it may.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS, merge_result
from benchmarks.lib.student_readers import logits_here, read_with

TOLERANCE = 1e-4
"""Tolerance for logits in float32: two versions of one library add in other orders."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a finished run's folder")
    parser.add_argument("--reader", action="append", required=True, metavar="NAME=PYTHON")
    parser.add_argument("--name", default="export", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    versions: dict[str, Any] = {}
    ids, logits_TV = logits_here(options.run / "student")
    for reader in options.reader:
        name, _, python = reader.partition("=")
        (reading,) = read_with(python, [options.run / "student"])
        same_ids = reading.facts["ids"] == ids
        gap = (reading.logits_TV - logits_TV).abs().max().item() if same_ids else float("inf")
        figures[f"{name}_max_abs_logit_diff"] = gap
        figures[f"{name}_same_token_ids"] = float(same_ids)
        versions[name] = reading.transformers
    print(json.dumps(figures, indent=2))
    if not all(figures[f"{name}_max_abs_logit_diff"] <= TOLERANCE for name in versions):
        sys.exit(f"a reader differs by more than {TOLERANCE}; nothing was written")
    print(merge_result(options.name, figures, folder=options.results, readers=versions))


if __name__ == "__main__":
    main()
