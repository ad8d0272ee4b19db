"""The plugin of SGLang's servers: found by its interface, and what it sets."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config import SglangScoring
from qwen3_distill.scoring.sglang.plugin import NAME, THRESHOLDS, write_plugin
from qwen3_distill.scoring.sglang.server import SglangServer

LOAD = """
import gc
from importlib.metadata import entry_points
(plugin,) = [each for each in entry_points(group="sglang.srt.plugins") if each.name == {name!r}]
plugin.load()()
print(gc.get_threshold())
"""


def test_it_is_found_by_sglangs_group_of_plugins(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "plugin")
    (found,) = importlib.metadata.distributions(path=[str(folder)])
    assert [each.group for each in found.entry_points] == ["sglang.srt.plugins"]
    assert write_plugin(folder) == folder  # as at a restart of the server


def test_it_sets_the_thresholds_and_says_in_which_process(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(name=NAME)],
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    said, after = done.stdout.splitlines()
    assert said == f"garbage collection: thresholds {THRESHOLDS} in MainProcess"
    assert after == str(THRESHOLDS)


@pytest.mark.parametrize(
    ("arguments", "is_written"),
    [({}, True), ({"gc-threshold": "700"}, False), ({"gc_threshold": "700"}, False)],
)
def test_thresholds_of_the_user_are_kept(
    tmp_path: Path, arguments: dict[str, Any], is_written: bool
) -> None:
    values = {"kind": "sglang", "model": "m", "server_arguments": arguments}
    server = SglangServer(
        SglangScoring.model_validate(values),
        context_length=8,
        memory_fraction=None,
        max_total_tokens=None,
        log=tmp_path / "log",
    )
    folders = server._importable(tmp_path)
    assert folders == ([tmp_path / "plugin"] if is_written else [])
    assert (tmp_path / "plugin").exists() == is_written
