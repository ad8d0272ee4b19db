"""Finds the files of a run folder's config from another working directory, or after a move."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3_distill.config.several import as_of_one_teacher, teacher_values
from qwen3_distill.utils.json_text import read_json

PATH_SETTINGS = (
    "student.model",
    "scoring.model",
    "prompts.path",
    "evaluation.prompts.path",
    "rollouts.file",
    "verifier.function",
    "evaluation.verifier.function",
    "generation.python",
    "scoring.python",
    "training.python",
    "scoring.cache",
    "scoring.api_key_file",
    "cluster.weights_folder",
)
"""Settings that hold a path, ``output_dir`` aside."""
_HUB_NAMES = {
    "student.model": "student",
    "prompts.path": "prompts",
    "evaluation.prompts.path": "evaluation.prompts",
}
"""Names in the manifest's record of the hub, of the settings that may hold a hub id. Those of
teachers: `_hub_name`."""


def find_paths(values: dict[str, Any], file: Path) -> None:
    """Replace, in place, relative paths of a run folder's config that lead nowhere from here.

    They count from the working directory of the run, which the manifest records. An ``output_dir``
    that is gone is the folder that the file lies in. Ids that the run found on the hub and other
    configs are not changed.
    """
    directory = run_directory(file)
    if directory is None:
        return
    from_hub = _last_start(file).get("hub")
    for setting, section, key in _places(values):
        if isinstance(from_hub, dict) and _hub_name(setting) in from_hub:
            continue
        found = directory / section[key]
        # verifier.function is file.py:name.
        files = [re.sub(r"(\.py):\w+$", r"\1", str(path)) for path in (section[key], found)]
        if not os.path.exists(files[0]) and os.path.exists(files[1]):
            section[key] = str(found)
    output_dir = values.get("output_dir")
    if isinstance(output_dir, str) and not os.path.isdir(output_dir):
        values["output_dir"] = str(file.parent)


def run_directory(config_file: Path) -> Path | None:
    """Return the working directory of a run's last start; None if the file is no run's config."""
    if config_file.name != "config.json":
        return None
    directory = _last_start(config_file).get("working_directory")
    return Path(directory) if isinstance(directory, str) else None


def _last_start(config_file: Path) -> dict[str, Any]:
    """Return the manifest's entry of the last start; empty where there is none."""
    try:
        manifest = read_json(config_file.with_name("manifest.json"))
        start = manifest["starts"][-1]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return {}
    return start if isinstance(start, dict) else {}


def _places(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    for setting in PATH_SETTINGS:
        section, _, key = setting.rpartition(".")
        if section == "scoring":
            nodes = list(teacher_values(values))
        else:
            nodes = [(section, _section(values, section))]
        for place, node in nodes:
            if isinstance(node, dict) and isinstance(node.get(key), str):
                yield f"{place}.{key}", node, key


def _section(values: dict[str, Any], path: str) -> Any:
    node: Any = values
    for name in path.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _hub_name(setting: str) -> str | None:
    """Return the manifest's name of what a setting may have from the hub."""
    if as_of_one_teacher(setting) == "scoring.model":
        return re.sub(r"\.(teachers|members|model)\b", "", setting.replace("scoring", "teacher", 1))
    return _HUB_NAMES.get(setting)
