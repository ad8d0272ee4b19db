"""Parses JSON that anyone may have written: every failure is one error."""

import json
from pathlib import Path
from typing import Any

from qwen3_distill.utils.shown import shortened, shown

MAX_DEPTH = 64
"""Deepest nesting that is read; code that walks a value may recurse."""


def parse_json(content: bytes | str) -> Any:
    """Parse JSON text in UTF-8.

    Raises:
        ValueError: it is not JSON (NaN and Infinity are none), not UTF-8, nested deeper than
            `MAX_DEPTH`, has a key twice in one object, or a number of thousands of digits.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=unique_pairs, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(shortened(str(error), 200)) from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise ValueError("it is nested too deeply")
    return value


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's fields; by default the last of two equal keys would win.

    Raises:
        ValueError: a key stands twice.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"a key stands twice among {shown([key for key, _ in pairs])}")
    return fields


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _is_deep(value: Any) -> bool:
    """Whether a value is nested deeper than `MAX_DEPTH`; walks level by level."""
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = [each for each in level if isinstance(each, dict | list)]
        level = [
            inner
            for each in containers
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: as for `parse_json`.
    """
    return parse_json(path.read_bytes())


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        OSError: the file cannot be read.
        ValueError: as for `parse_json`, or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got a {type(value).__name__}")
    return value
