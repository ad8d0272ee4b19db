"""Decides whether a folder is a run's own, before anything is written into it."""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen3_distill.config import RunConfig, TaskPrompts
from qwen3_distill.errors import ConfigError, RunFolderError
from qwen3_distill.utils.files import content_of
from qwen3_distill.utils.json_text import read_json

_CONFIG_KEYS = {"output_dir", "student", "scoring", "training"}
"""Settings that every run's ``config.json`` has and no model's."""
_BEFORE_THE_CONFIG = {
    ".lock": re.compile(""),
    "logs": re.compile(r".*\.log|mps"),
    "offline": re.compile(r"(rollouts|scored|student)\b.*"),
}
"""Names left by a killed start or the offline stages, which write no config; what each may hold."""
_OF_A_MODEL = re.compile(
    r".*\.(safetensors|safetensors\.index\.json|jinja)|(generation_|tokenizer_)?config\.json"
    r"|tokenizer.*|vocab\.json|merges\.txt|special_tokens_map\.json|added_tokens\.json"
)
_RECORD = re.compile(
    r"(?:config|manifest|prompt|summary|status)\.json|(?:metrics|evaluations|ledger|cost)\.jsonl"
    r"|trace(?:-\d+)?\.json"
)
"""Files of a run folder that no command's output may replace."""


def require_own_folder(folder: Path) -> None:
    """Check that a run may write into ``folder``: a new or empty one, or a run's.

    What operating systems leave in folders does not count, nor does the file that this process's
    output is redirected to.

    Raises:
        RunFolderError: the folder holds files of something else.
    """
    names = [name for name in _names(folder) if not _is_own_output(folder / name)]
    if not names or _is_of_a_run(folder) or _is_of_an_unfinished_start(folder, names):
        return
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    raise RunFolderError(
        f"{folder} holds files of something else ({', '.join(names[:4])}{more}), expected a new or "
        "empty folder, or a run folder; choose another output_dir"
    )


def refuse_inputs_as_student(config: RunConfig) -> None:
    """Check that no input of a run lies where the run writes its student.

    Raises:
        ConfigError: names the setting.
    """
    student = os.path.realpath(config.output_path / "student")
    for setting, path in input_paths(config).items():
        if os.path.commonpath([student, os.path.realpath(path)]) == student:
            raise ConfigError(
                f"{setting}={path} lies in {config.output_path / 'student'}, where the run writes "
                "the trained student; choose another output_dir"
            )


def refuse_foreign_files_as_output(out: Path) -> None:
    """Check that a command's output replaces no file of a model or a run, whichever it is.

    Raises:
        ConfigError: names the folder.
    """
    file = Path(os.path.realpath(out))
    if not file.is_file():
        return
    config = _json(file.parent / "config.json")
    of_a_model = isinstance(config, dict) and "model_type" in config
    if of_a_model and _OF_A_MODEL.fullmatch(file.name):
        raise ConfigError(f"{out} would replace a file of a model; choose another --out")
    if _RECORD.fullmatch(file.name) and _is_of_a_run(file.parent):
        raise ConfigError(f"{out} would replace a run's records; choose another --out")


def refuse_inputs_as_output(out: Path, inputs: Mapping[str, str | Path]) -> None:
    """Check that a command's output replaces none of its inputs, nor a file of a model.

    Args:
        inputs: by the setting or option that names them.

    Raises:
        ConfigError: names the input.
    """
    real = os.path.realpath(out)
    for setting, path in inputs.items():
        source = os.path.realpath(path)
        in_model = os.path.dirname(real) == source and _OF_A_MODEL.fullmatch(Path(real).name)
        if real == source or in_model:
            raise ConfigError(
                f"{out} would replace what {setting}={path} names; choose another --out"
            )
    refuse_foreign_files_as_output(out)


def input_paths(config: RunConfig) -> dict[str, str]:
    """Return the config's models and prompt files by setting."""
    found = {"student.model": config.student.model}
    for teacher in config.teachers:
        found[f"{teacher.setting}.model"] = teacher.section.model
    if config.rollouts.file is not None:
        found["rollouts.file"] = config.rollouts.file
    sections = {"prompts": config.prompts}
    if config.evaluation is not None:
        sections["evaluation.prompts"] = config.evaluation.prompts
    for name, prompts in sections.items():
        if not isinstance(prompts, TaskPrompts):
            found[f"{name}.path"] = prompts.path
    return found


def _names(folder: Path) -> list[str]:
    try:
        return content_of(folder)
    except OSError as error:
        raise RunFolderError(
            f"run folder {folder} cannot be written: {error.strerror}; choose another output_dir"
        ) from error


def _is_own_output(path: Path) -> bool:
    """Whether standard output or error goes into this file, as with ``> RUN/log.txt``."""
    try:
        found = path.stat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and any(
        (found.st_dev, found.st_ino) == output for output in _outputs()
    )


def _outputs() -> Iterator[tuple[int, int]]:
    for descriptor in (1, 2):
        try:
            found = os.fstat(descriptor)
        except OSError:
            continue
        yield found.st_dev, found.st_ino


def _is_of_a_run(folder: Path) -> bool:
    """Whether the config or, where that is damaged, the manifest is a run's."""
    config, manifest = _json(folder / "config.json"), _json(folder / "manifest.json")
    is_config = isinstance(config, dict) and config.keys() >= _CONFIG_KEYS
    return is_config or (isinstance(manifest, dict) and isinstance(manifest.get("starts"), list))


def _is_of_an_unfinished_start(folder: Path, names: list[str]) -> bool:
    return all(
        name in _BEFORE_THE_CONFIG
        and all(
            _BEFORE_THE_CONFIG[name].fullmatch(inner)
            for inner in (content_of(folder / name) if (folder / name).is_dir() else ())
        )
        for name in names
    )


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None
