"""Tries odd configs, replies, files and model directories, and writes what became of them.

    python -m benchmarks.robustness.fuzz --seed 1
    python -m benchmarks.robustness.fuzz --seed 7 --kinds replies http_replies --out runs/fuzz.json

A kind's counts replace its earlier ones in the file; those of other kinds stay, so kinds may be run
one after another, and an interrupted command loses only the kind that it was at.

Figures: inputs tried by kind (``configs``, ``replies``, ``vllm_replies``, ``files``,
``prompt_files``, ``http_replies``, ``model_dirs``), and over all kinds ``tracebacks``, ``wrong``,
``hangs`` and ``key_leaks``. The exit status is 1 if one of the last four is not 0.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS, command_line, write_result
from benchmarks.robustness.fuzz.counts import Counts
from benchmarks.robustness.fuzz.kinds import KINDS, load_kind

_FAILURES = ("tracebacks", "wrong", "hangs", "key_leaks")


def main() -> None:
    arguments = _arguments()
    failed = False
    for name in arguments.kinds:
        count = arguments.count or KINDS[name][1]
        began = time.monotonic()
        counts = load_kind(name)(arguments.seed, count)
        _write(arguments.out, name, arguments.seed, counts, time.monotonic() - began)
        failed |= bool(counts.failures)
        for example in counts.examples:
            print(f"  {name}: {example}")
    sys.exit(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--count", type=int, help="inputs of each kind; default: that of the kind")
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz.json")
    return parser.parse_args()


def _write(out: Path, name: str, seed: int, counts: Counts, wall_s: float) -> None:
    """Put a kind's counts into the result, and the sums over all kinds."""
    kinds: dict[str, Any] = {}
    if out.exists():
        kinds = json.loads(out.read_text(encoding="utf-8"))["kinds"]
    kinds[name] = {
        "command": command_line(),
        "seed": seed,
        "wall_s": round(wall_s, 1),
        **dataclasses.asdict(counts),
    }
    figures = {kind: float(kinds[kind]["tried"]) for kind in KINDS if kind in kinds}
    figures |= {key: float(sum(each[key] for each in kinds.values())) for key in _FAILURES}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_result(out.stem, figures, folder=out.parent, kinds=kinds)
    print(f"{name}: {counts.tried} tried, {counts.failures} failures, {wall_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()
