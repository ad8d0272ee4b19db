"""Reads a config: a YAML 1.2 file and ``key.sub=value`` overrides become a checked `RunConfig`.

No environment variable is read. Values are passed to pydantic as JSON, so that a YAML list may
fill a tuple while strings still do not become numbers.
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwen3_distill.config import RunConfig
from qwen3_distill.config.moved import find_paths
from qwen3_distill.config.overrides import apply_override, run_schema
from qwen3_distill.config.redaction import may_be_secret, not_recorded
from qwen3_distill.config.schema import locate, option_schemas
from qwen3_distill.config.self_teacher import with_student_as_teacher
from qwen3_distill.config.yaml12 import MAX_CHARACTERS, parse_yaml
from qwen3_distill.errors import ConfigError
from qwen3_distill.utils.printable import excerpt
from qwen3_distill.utils.secrets import without_user
from qwen3_distill.utils.shown import shortened, shown


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, for_records: bool = False
) -> RunConfig:
    """Read, override and check a config file.

    Args:
        path: YAML or JSON; a run folder's ``config.json`` works as well, if what it leaves out
            (`redaction.recordable`) is given by overrides.
        overrides: ``key.sub=value`` each; see `overrides.apply_override`.
        for_records: the config is read about a run, and starts none; what was left out may lack.

    Raises:
        ConfigError: names every wrong key with what was expected.
    """
    values = load_values(path, overrides)
    left_out = [] if for_records else not_recorded(values)
    if left_out:
        raise ConfigError(
            f"{path}: a run folder does not keep {', '.join(left_out)}, because it may be a "
            f"secret; give it again, e.g. {left_out[0]}=VALUE after the config, or use the config "
            "file that the run was started with"
        )
    return check_config(values, source=str(path))


def load_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the file's values with the overrides applied, unchecked."""
    file = Path(path)
    try:
        with file.open("rb") as opened:  # bounded: it may be a model's weights, or a device
            content = opened.read(4 * MAX_CHARACTERS + 1)
        if len(content) > 4 * MAX_CHARACTERS:
            raise ConfigError(
                f"config file {file} has more than {4 * MAX_CHARACTERS:,} bytes; check that it is "
                "a config"
            )
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {file} does not exist (working directory {Path.cwd()})")
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a null character in the path
        raise ConfigError(f"config file {file} cannot be read: {error}") from error
    values = parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a mapping of settings, got {type(values).__name__}")
    find_paths(values, file)
    for override in overrides:
        apply_override(values, override)
    return values


def check_config(values: dict[str, Any], source: str = "config") -> RunConfig:
    """Validate raw values.

    Raises:
        ConfigError: one line per problem.
    """
    for keys in _halves_of_characters(values, ()):
        raise ConfigError(
            f"{source}: {shown('.'.join(keys))[1:-1]}: has half of a character (a lone surrogate, "
            "\\ud800 to \\udfff); write the whole character"
        )
    try:
        return RunConfig.model_validate_json(json.dumps(with_student_as_teacher(values)))
    except ValidationError as error:
        lines = [
            shortened(without_user(_explain(problem)), _LINE_LENGTH) for problem in error.errors()
        ]
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES:] = [f"and {len(lines) - _MOST_LINES} more"]
        raise ConfigError(f"{source}: " + "\n  ".join(["", *lines]).strip()) from None
    except (TypeError, ValueError, RecursionError) as error:
        reason = shortened(str(error), _LINE_LENGTH)
        raise ConfigError(f"{source}: not representable as JSON: {reason}") from error


def dump_config(config: RunConfig) -> dict[str, Any]:
    """Return the resolved config as plain JSON values; `check_config` turns them back."""
    return config.model_dump(mode="json")


def config_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List ``key: old -> new`` for every leaf that differs."""
    flat_old, flat_new = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{key}: {flat_old.get(key, 'absent')!r} -> {flat_new.get(key, 'absent')!r}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key, "absent") != flat_new.get(key, "absent")
    ]


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list) and any(isinstance(value, dict) for value in values):
        for index, value in enumerate(values):
            yield from _leaves(value, f"{prefix}.{index}")
    else:
        yield prefix, values


_HALF = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")
"""A surrogate without its other half; two halves in a row become the character."""


def _halves_of_characters(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield where a text or a key has a lone surrogate, which no file and no JSON has a form for.

    The value itself is not shown: it may be a secret.
    """
    if isinstance(value, str) and _HALF.search(value):
        yield keys
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from _halves_of_characters(str(key), (*keys, str(key)))
            yield from _halves_of_characters(child, (*keys, str(key)))
    elif isinstance(value, list):
        for child in value:
            yield from _halves_of_characters(child, keys)


_MOST_LINES, _LINE_LENGTH = 20, 600
_FRIENDLY = {
    "missing": "missing; it has no default and must be set",
    "union_tag_not_found": "needs a `kind`",
}


def _explain(problem: Any) -> str:
    """Describe one pydantic error in a line: where, what was found, what was expected."""
    location = [str(part) for part in problem["loc"]]
    keys, _ = locate(run_schema(), location)
    path = ".".join(keys)
    kind, message = problem["type"], problem["msg"]
    if kind == "extra_forbidden":
        return f"{path}: unknown key{_nearest(location, problem)}"
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        return f"{path}: {message}" if path else message
    if kind == "union_tag_invalid":
        context = problem["ctx"]
        close = difflib.get_close_matches(str(context["tag"]), _tags(context), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return (
            f"{path}.kind: {shown(context['tag'])} is not one of {', '.join(_tags(context))}{hint}"
        )
    if kind in _FRIENDLY:
        return f"{path}: {_FRIENDLY[kind]}"
    message = message[0].lower() + message[1:]
    return f"{path}: {message}; got {_found(keys, problem['input'])}"


def _found(keys: tuple[str, ...], value: Any) -> str:
    """Show a wrong value and its type; of one that may hold a secret, the type alone."""
    kind = type(value).__name__
    if may_be_secret(keys) or _has_text_inside(value):
        return f"a value of type {kind}"
    return f"{excerpt(without_user(shown(value)))} ({kind})"


def _has_text_inside(value: Any) -> bool:
    """Whether a list or mapping, which may be a whole section, has a text at any depth."""
    children = list(value.values()) if isinstance(value, dict) else value
    return isinstance(children, list) and any(
        isinstance(child, str) or _has_text_inside(child) for child in children
    )


def _tags(context: dict[str, Any]) -> list[str]:
    return re.findall(r"'([^']+)'", str(context["expected_tags"]))


def _nearest(location: Sequence[str], problem: Any) -> str:
    known = sorted(_known_keys(location[:-1]))
    close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known keys here: {', '.join(known)}"


def _known_keys(location: Sequence[str]) -> set[str]:
    """Return the schema's keys at a pydantic error location, which includes union tags."""
    schema = run_schema()
    _, node = locate(schema, location)
    return {
        key
        for option in option_schemas(node, schema["$defs"])
        for key in option.get("properties", ())
    }
