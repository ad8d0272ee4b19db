"""Writes a benchmark's result: figures, command, commit, machine and versions."""

import json
import shlex
import sys
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3_distill.pipeline.manifest import git_revision, machine, versions
from qwen3_distill.utils.files import write_json_atomic

RESULTS = Path(__file__).parents[1] / "results"
_REVISION = git_revision(Path(__file__).parent) or {"commit": "unknown", "dirty": True}
"""The commit of the imported code: others may be made while a long benchmark runs."""


def commit() -> str:
    """Return the commit of the imported code, with "+changes" if files differ from it."""
    return _REVISION["commit"] + ("+changes" if _REVISION["dirty"] else "")


def module_name() -> str:
    """Return the name of the module that this process runs."""
    script = Path(sys.argv[0])
    parts = script.resolve().relative_to(Path(__file__).parents[2]).with_suffix("").parts
    return ".".join(part for part in parts if part != "__main__")


def command_line() -> str:
    """Return the command that runs this benchmark, as a user types it."""
    return shlex.join(["python", "-m", module_name(), *sys.argv[1:]])


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
            "commit": commit(),
            "machine": machine(),
            "versions": versions(),
            "figures": figures,
            **details,
        },
    )
    return path


def merge_result(
    name: str, figures: dict[str, float], *, folder: Path = RESULTS, **details: Any
) -> Path:
    """Add figures and details to a result that may exist; what others wrote stays.

    The result's own command, commit, machine and versions are the last ones; those of every
    benchmark and the names of its figures are in ``measured``, by its module.
    """
    file = folder / f"{name}.json"
    earlier: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    written = ("name", "command", "commit", "machine", "versions", "figures", *details)
    others = {key: value for key, value in earlier.items() if key not in written}
    own = {
        "command": command_line(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "figures": sorted(figures),
    }
    others["measured"] = earlier.get("measured", {}) | {module_name(): own}
    merged = {**earlier.get("figures", {}), **figures}
    return write_result(name, merged, folder=folder, **others, **details)


@dataclass
class Report:
    """A result that grows: the file is written again with every part that is added."""

    name: str
    folder: Path
    figures: dict[str, float] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        file = self.folder / f"{self.name}.json"
        if file.exists():
            earlier = json.loads(file.read_text())
            self.figures, self.parts = earlier["figures"], earlier["parts"]

    def add(self, part: str, figures: dict[str, float], **details: Any) -> None:
        self.figures |= {key: round(value, 4) for key, value in figures.items()}
        known = self.parts.get(part, {})
        self.parts[part] = known | {"command": command_line(), **figures, **details}
        print(part, json.dumps(figures | details, default=str), flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_result(self.name, self.figures, folder=self.folder, parts=self.parts)


async def timed(work: Awaitable[Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = await work
    return result, time.perf_counter() - began
