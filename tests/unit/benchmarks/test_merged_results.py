"""A result that several benchmarks write says which of them measured what."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib import common

ROOT = Path(__file__).parents[3]


def test_each_benchmark_keeps_its_command_commit_figures_and_details(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = iter(["first", "second", "third"])

    def add(words: list[str], figures: dict[str, float], **details: Any) -> dict[str, Any]:
        mine = next(commits)
        monkeypatch.setattr(common, "commit", lambda: mine)
        script = ROOT / "benchmarks" / "teachers" / words[0]
        monkeypatch.setattr(sys, "argv", [str(script), *words[1:]])
        file = common.merge_result("both", figures, folder=tmp_path, **details)
        return json.loads(file.read_text())

    add(["several.py", "--seeds", "5"], {"b": 2.0, "a": 1.0}, several_runs=[1, 2])
    add(["privileged.py"], {"c": 3.0}, privileged=[3])
    found = add(["several.py", "--seeds", "1"], {"a": 4.0}, several_runs=[5])

    assert found["figures"] == {"b": 2.0, "a": 4.0, "c": 3.0}
    assert (found["several_runs"], found["privileged"]) == ([5], [3])
    assert found["command"] == "python -m benchmarks.teachers.several --seeds 1"
    assert found["commit"] == "third"
    several = found["measured"]["benchmarks.teachers.several"]
    other = found["measured"]["benchmarks.teachers.privileged"]
    assert (several["commit"], several["figures"]) == ("third", ["a"])
    assert (other["commit"], other["figures"]) == ("second", ["c"])
    assert other["command"] == "python -m benchmarks.teachers.privileged"
