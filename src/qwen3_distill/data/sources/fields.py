"""Reads a field of a row by its name or, with dots, from the objects and lists inside the row."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeAlias

from qwen3_distill.config import (
    ContextConfig,
    HuggingFacePrompts,
    JsonlPrompts,
    ParquetPrompts,
)
from qwen3_distill.errors import DataError
from qwen3_distill.utils.shown import shown

RowPrompts: TypeAlias = JsonlPrompts | ParquetPrompts | HuggingFacePrompts
Row: TypeAlias = tuple[str, Mapping[str, Any]]
"""Where the row is, for error messages, and its fields."""


def read_field(row: Mapping[str, Any], path: str, setting: str, where: str) -> Any:
    """Return the value at ``path``: a key of the row, or keys and list positions with dots between.

    A key that has the dots in its name comes first. Negative positions count from the end.

    Args:
        setting: that names the field, for the error: of `prompts`, or with dots of the config.

    Raises:
        DataError: there is no such field.
    """
    if path in row:
        return row[path]
    setting = setting if "." in setting else f"prompts.{setting}"
    node: Any = row
    parts = path.split(".")
    for depth, part in enumerate(parts):
        place = f"{where}, field {'.'.join(parts[:depth])!r}" if depth else where
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, Mapping):
            name = part if depth else parts[0]
            raise DataError(missing_field(name, node, setting, place))
        elif isinstance(node, Sequence) and not isinstance(node, str) and _is_position(part, node):
            node = node[int(part)]
        else:
            size = f" of {len(node)}" if isinstance(node, list) else ""
            raise DataError(
                f"{place} is of type {type(node).__name__}{size} and has no {part!r}, expected "
                f"an object or a list that has it; change {setting} or the data"
            )
    return node


def wanted_columns(
    config: RowPrompts, names: Sequence[str], context: ContextConfig | None = None
) -> list[str]:
    """Return the columns that hold the config's fields, and those that the context reads."""
    if context is not None and context.row_fields is None:
        return list(names)
    tag_field = config.tagging.field if config.tagging else None
    fields = [config.prompt_field, config.answer_field, tag_field]
    fields += [] if context is None else sorted(context.row_fields or ())
    columns = [name if name in names else name.split(".")[0] for name in fields if name is not None]
    return list(dict.fromkeys(columns))


def check_columns(
    present: Iterable[str], config: RowPrompts, where: str, context: ContextConfig | None = None
) -> None:
    """Check that the columns of the config's fields, and of the context's, exist.

    Raises:
        DataError: one does not; the message names the nearest.
    """
    present = list(present)
    settings = {"prompt_field": config.prompt_field, "answer_field": config.answer_field}
    named = {f"prompts.{setting}": name for setting, name in settings.items()}
    named |= {"scoring.by": config.tagging.field} if config.tagging else {}
    for setting, name in named.items():
        if name is None or name in present or name.split(".")[0] in present:
            continue
        raise DataError(missing_field(name.split(".")[0], present, setting, where))
    for name in () if context is None else sorted(context.row_fields or ()):
        if name not in present:
            raise DataError(missing_field(name, present, "scoring.context", where))


def missing_field(name: str, present: Iterable[str], setting: str, where: str) -> str:
    """Describe a field that a row does not have, with those that it has."""
    present = list(present)
    near = get_close_matches(name, [each for each in present[:200] if len(each) < 200], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"{where} has no field {shown(name)}{hint}; its fields are {shown(present)}. Change "
        f"{setting} or the data"
    )


def _is_position(part: str, values: Sequence[Any]) -> bool:
    digits = part.removeprefix("-")
    is_number = digits.isascii() and digits.isdecimal() and len(digits) < 10
    return is_number and -len(values) <= int(part) < len(values)
