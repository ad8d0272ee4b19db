"""Reads the JSON schema of a config."""

import re
from collections.abc import Sequence
from typing import Any


def option_schemas(node: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the schemas that a schema node stands for: references and unions resolved."""
    if "$ref" in node:
        return option_schemas(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions)
    branches = node.get("oneOf") or node.get("anyOf")
    if branches:
        return [option for branch in branches for option in option_schemas(branch, definitions)]
    return [node]


def locate(
    schema: dict[str, Any], location: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Follow a pydantic error location; return the keys of the file in it, and the schema there.

    After every union, pydantic puts the tag or the type of the branch into a location.
    """
    keys: list[str] = []
    node = schema
    for part in location:
        node = _only_branch(node, schema["$defs"])
        tags = node.get("discriminator", {}).get("mapping", {})
        if part in tags:
            node = {"$ref": tags[part]}
        elif "anyOf" in node:
            node = {}
        else:
            keys.append(part)
            node = _below(node, part)
    return tuple(keys), node


def _only_branch(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Resolve references, and unions whose other branch is null."""
    while True:
        branches = [b for b in node.get("anyOf", ()) if b != {"type": "null"}]
        if "$ref" in node:
            node = definitions[node["$ref"].rsplit("/", 1)[-1]]
        elif len(branches) == 1:
            (node,) = branches
        else:
            return node


def _below(node: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the schema of a key of an object or of a place in a list; empty if unknown."""
    if key in node.get("properties", {}):
        return node["properties"][key]
    if key.isdigit() and int(key) < len(node.get("prefixItems", ())):
        return node["prefixItems"][int(key)]
    for name, below in node.get("patternProperties", {}).items():
        if re.search(name, key):
            return below
    below = node.get("items" if key.isdigit() else "additionalProperties")
    return below if isinstance(below, dict) else {}
