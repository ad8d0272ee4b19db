"""What every benchmark shares: the form of its result."""

import shlex
import sys
from pathlib import Path
from typing import Any

from qwen3_distill.pipeline.manifest import git_revision, machine, versions
from qwen3_distill.utils.files import write_json_atomic

RESULTS = Path(__file__).parents[1] / "results"
_REVISION = git_revision(Path(__file__).parent) or {"commit": "unknown", "dirty": True}
"""Of the code that is imported, not of what is committed while a long benchmark runs."""


def command_line() -> str:
    """The command that runs this benchmark, as a user types it."""
    script = Path(sys.argv[0])
    module = f"benchmarks.{script.parent.name}.{script.stem}"
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def write_result(
    name: str, figures: dict[str, float], *, folder: Path = RESULTS, **details: Any
) -> Path:
    """Write ``<folder>/<name>.json`` with the command, commit, machine and versions."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    write_json_atomic(
        path,
        {
            "name": name,
            "command": command_line(),
            "commit": _REVISION["commit"] + ("+changes" if _REVISION["dirty"] else ""),
            "machine": machine(),
            "versions": versions(),
            "figures": figures,
            **details,
        },
    )
    return path
