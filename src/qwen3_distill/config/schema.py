"""Reads the JSON schema of a config."""

from typing import Any


def option_schemas(node: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the schemas that a schema node stands for: references and unions resolved."""
    if "$ref" in node:
        return option_schemas(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions)
    branches = node.get("oneOf") or node.get("anyOf")
    if branches:
        return [option for branch in branches for option in option_schemas(branch, definitions)]
    return [node]
