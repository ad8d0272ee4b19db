"""The export command in this process, and what a folder holds."""

import hashlib
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qwen3_distill.cli.export import export
from qwen3_distill.errors import DistillError


def call_export(*arguments: str | Path) -> str:
    """Return the command's output. Its errors are raised."""
    app = typer.Typer()
    app.command()(export)
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: str | Path, words: tuple[str, ...]) -> DistillError:
    """The error of the command, which says all of the words."""
    with pytest.raises(DistillError) as caught:
        call_export(*arguments)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    return caught.value


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of change of every file and folder."""
    found: dict[str, tuple[str, int]] = {}
    for path in sorted(folder.rglob("*")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[path.relative_to(folder).as_posix()] = (digest, path.stat().st_mtime_ns)
    return found


def copy_of(run: Path, folder: Path) -> Path:
    """A run folder that a test may spoil."""
    shutil.copytree(run, folder)
    return folder
