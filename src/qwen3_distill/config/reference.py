"""Renders the configuration reference as Markdown, from the schema alone."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel


def config_reference(root: type[BaseModel]) -> str:
    """Return an index, and one section per class of the schema with a table of its keys."""
    schema = root.model_json_schema()
    definitions: dict[str, Any] = schema.get("$defs", {})
    lines = [
        "# Configuration",
        "",
        "Generated from the schema by `make docs`; do not edit. A config is a YAML file; every key",
        "can be replaced on the command line: `qwen3-distill run --config FILE key.sub=value`.",
        "There a text is taken as it is written, or without one pair of quotes around the whole;",
        "`null` and `~` stand for null. Values of other types are YAML 1.2, as in a file.",
        "Unknown keys, wrong types and impossible combinations are refused.",
        "`qwen3-distill config show --config FILE` prints a config with all defaults.",
        "",
        *_index(root.__name__, schema, definitions),
        *_section(root.__name__, schema, definitions),
    ]
    for name in _reachable(schema, definitions):
        lines += _section(name, definitions[name], definitions)
    return "\n".join(lines).rstrip() + "\n"


def _index(name: str, schema: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    """Return a table of the top-level keys with the sections that each leads to."""
    rows: list[str] = []
    for key, value in schema.get("properties", {}).items():
        if sections := _reachable({"properties": {key: value}}, definitions):
            links = ", ".join(f"[{section}](#{section.lower()})" for section in sections)
            rows.append(f"| `{key}` | {links} |")
    top = f"| all others | [{name}](#{name.lower()}) |"
    return ["## Index", "", "| top-level key | sections |", "|---|---|", *rows, top, ""]


def _reachable(node: Any, definitions: dict[str, Any]) -> list[str]:
    """Return the names of the definitions that have keys, in the order the keys refer to them."""
    order: list[str] = []
    queue = list(_references(node.get("properties", {})))
    while queue:
        name = queue.pop(0)
        if name not in order and "properties" in definitions[name]:
            order.append(name)
            queue = [*_references(definitions[name].get("properties", {})), *queue]
    return order


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rsplit("/", 1)[-1]
        for key, value in node.items():
            if key not in ("discriminator", "default"):
                yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _section(name: str, schema: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    rows = [
        f"| `{key}` | {_type(value)} | {_default(key, value, schema)} | "
        f"{_text(value, definitions)} |"
        for key, value in schema.get("properties", {}).items()
    ]
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
    return [f"## {name}", "", _one_line(schema.get("description", "")), "", *table, ""]


def _type(value: dict[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{option}`" for option in value["enum"])
    for key in ("oneOf", "anyOf"):
        if key in value:
            return " or ".join(_type(option) for option in value[key])
    if value.get("type") == "array":
        if "prefixItems" in value:
            return f"[{', '.join(_type(item) for item in value['prefixItems'])}]"
        return f"list of {_type(value['items'])}"
    return f"{value.get('type', 'any')}{_bounds(value)}"


def _bounds(value: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {value[key]:g}" for key, sign in signs.items() if key in value]
    return f" {', '.join(bounds)}" if bounds else ""


def _default(key: str, value: dict[str, Any], schema: dict[str, Any]) -> str:
    if key in schema.get("required", []):
        return "required"
    if "default" in value:
        return f"`{json.dumps(value['default'])}`"
    return "its own defaults"


def _text(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return the key's own description, else that of the one section it refers to."""
    sections = list(_references(value))
    inherited = definitions[sections[0]] if len(sections) == 1 else {}
    text = value.get("description") or inherited.get("description", "")
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())
