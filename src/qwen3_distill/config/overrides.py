"""Applies ``key.sub=value`` overrides of the command line to a config's values.

The schema says how a value is read. A setting that takes text takes it as it is given; every other
value is YAML 1.2.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from qwen3_distill.config import RunConfig
from qwen3_distill.config.redaction import may_be_secret
from qwen3_distill.config.schema import option_schemas
from qwen3_distill.config.yaml12 import MAX_DEPTH, parse_yaml
from qwen3_distill.errors import ConfigError
from qwen3_distill.utils.printable import excerpt
from qwen3_distill.utils.secrets import without_user
from qwen3_distill.utils.shown import shown

_SINGLE_QUOTED = re.compile(r"\s*'((?:[^']|'')*)'\s*", re.DOTALL)
_DOUBLE_QUOTED = re.compile(r'\s*("(?:[^"\\]|\\.)*")\s*', re.DOTALL)
_ESCAPE_OR_BREAK = re.compile(r"\\.|[\n\r\x85\u2028\u2029]", re.DOTALL)
_NULL = ("null", "Null", "NULL", "~")

_Reading = Literal["text", "text or null", "yaml"]


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set ``key.sub=value`` in a config's unchecked values.

    Text settings take the value literally: blanks at its ends, ``#``, colons and brackets stay.
    One pair of quotes around the whole value is removed, as YAML does. ``null`` and ``~`` are
    null, the words are written in quotes. An empty value is null for a setting that may be null,
    else the empty text. Settings of other types take YAML.

    Raises:
        ConfigError: it is no ``key.sub=value``, the value is not valid YAML, or the key lies below
            something that is no section.
    """
    key, equals, text = override.partition("=")
    where = f"override {_shown(key, override)}"
    if not equals or not key.strip():
        raise ConfigError(f"{where}: expected key.sub=value, e.g. sampling.max_new_tokens=64")
    *parents, last = path = key.strip().split(".")
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"{where}: {len(path)} levels, expected at most {MAX_DEPTH}")
    node = values
    for depth, parent in enumerate(parents):
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            above = tuple(parents[: depth + 1])
            found = f"a {type(child).__name__}" if may_be_secret(above) else excerpt(shown(child))
            raise ConfigError(
                f"{where}: {'.'.join(above)} is {found}, not a section; there is nothing below it "
                "to set"
            )
        node = child
    reading = _reading(path, values)
    if reading == "yaml":
        node[last] = parse_yaml(text, where)
    else:
        node[last] = _read_text(text, where, empty_is_null=reading == "text or null")


def _shown(key: str, override: str) -> str:
    """Return the override as errors show it: without the value of what may be a secret."""
    parts = tuple(re.split(r"[.\s:]+", key.strip()))
    if may_be_secret(parts) or "{" in override:  # a section holds any setting
        return f"of {'.'.join(parts[:2])} (its value is not shown)"
    return excerpt(without_user(shown(override)))


def _read_text(text: str, where: str, *, empty_is_null: bool) -> str | None:
    if text in _NULL or (empty_is_null and not text):
        return None
    if quoted := _SINGLE_QUOTED.fullmatch(text):
        return quoted[1].replace("''", "'")
    if quoted := _DOUBLE_QUOTED.fullmatch(text):
        # Breaks are escaped first: YAML would fold them into blanks.
        return parse_yaml(_ESCAPE_OR_BREAK.sub(_escaped_break, quoted[1]), where)
    return text


def _escaped_break(found: re.Match[str]) -> str:
    breaks = {"\n": "\\n", "\r": "\\r", "\x85": "\\N", "\u2028": "\\L", "\u2029": "\\P"}
    return breaks.get(found[0], found[0])


def _reading(path: Sequence[str], values: dict[str, Any]) -> _Reading:
    """Return how the schema reads a setting: as text if no other type is allowed there."""
    types = {
        "other" if {"enum", "const"} & schema.keys() else schema.get("type", "other")
        for schema in _schemas_at(path, values)
    }
    if types == {"string"}:
        return "text"
    return "text or null" if types == {"string", "null"} else "yaml"


def _schemas_at(path: Sequence[str], values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the schemas of a setting: of the section's `kind`, or of all kinds if it has none."""
    root = run_schema()
    definitions: dict[str, Any] = root["$defs"]
    nodes, here = [root], values
    for part in path:
        kind = here.get("kind") if isinstance(here, dict) else None
        of_kind = [node for node in nodes if _kind(node) == kind]
        nodes = [
            option
            for node in of_kind or nodes
            if (below := _below(node, part)) is not None
            for option in option_schemas(below, definitions)
        ]
        here = here.get(part) if isinstance(here, dict) else None
    return nodes


def _below(node: dict[str, Any], part: str) -> dict[str, Any] | None:
    """Return the schema of a section's key, or of a free-form section's values."""
    named = node.get("patternProperties", {}).values()
    free = next(iter(named), node.get("additionalProperties"))
    below = node.get("properties", {}).get(part, free)
    return below if isinstance(below, dict) else None


def _kind(node: dict[str, Any]) -> Any:
    return node.get("properties", {}).get("kind", {}).get("const")


@cache
def run_schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()
