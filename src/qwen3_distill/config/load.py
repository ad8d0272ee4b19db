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

import yaml
from pydantic import ValidationError
from yaml.composer import ComposerError

from qwen3_distill.config import RunConfig
from qwen3_distill.config.moved import find_paths
from qwen3_distill.errors import ConfigError


class _Yaml12Loader(yaml.SafeLoader):
    """Reads YAML 1.2 and refuses a key that is set twice.

    PyYAML itself reads YAML 1.1: ``1e-5`` is a string, ``off`` and ``no`` are booleans, ``010`` is
    eight, ``1:30`` is ninety, ``2024-11-25`` is a date, and the last of two equal keys counts.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen: set[str] = set()
        for key in keys:
            if key.value in seen:
                raise ComposerError(None, None, f"{key.value!r} is set twice", key.start_mark)
            seen.add(key.value)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = node.value.replace("_", "")
        bases = {"0b": 2, "0o": 8, "0x": 16}
        return int(digits, bases.get(digits.lstrip("+-")[:2], 10))


_YAML_12 = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
"""Pattern and first characters of each type that YAML 1.2 reads otherwise than 1.1."""
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in (*_YAML_12, "timestamp")}
_Yaml12Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _letters) in _YAML_12.items():
    _Yaml12Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_letters)
    )
_Yaml12Loader.add_constructor("tag:yaml.org,2002:int", _Yaml12Loader.construct_yaml_int)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and check a config file.

    Args:
        path: YAML or JSON; a run folder's ``config.json`` works as well.
        overrides: ``key.sub=value`` each; the value is YAML.

    Raises:
        ConfigError: names every wrong key with what was expected.
    """
    return check_config(load_values(path, overrides), source=str(path))


def load_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the file's values with the overrides applied, unchecked."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {file} does not exist (working directory {Path.cwd()})")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file} cannot be read: {error}") from error
    values = _parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a mapping of settings, got {type(values).__name__}")
    find_paths(values, file)
    for override in overrides:
        _apply_override(values, override)
    return values


def check_config(values: dict[str, Any], source: str = "config") -> RunConfig:
    """Validate raw values.

    Raises:
        ConfigError: one line per problem.
    """
    try:
        return RunConfig.model_validate_json(json.dumps(values))
    except ValidationError as error:
        lines = [_explain(problem, values) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "\n  ".join(["", *lines]).strip()) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: not representable as JSON: {error}") from error


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
    else:
        yield prefix, values


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Yaml12Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a malformed number such as 0x_
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"override {override!r}: expected key.sub=value, e.g. sampling.max_new_tokens=64"
        )
    *parents, last = key.strip().split(".")
    node = values
    for depth, parent in enumerate(parents):
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(parents[: depth + 1])} is {child!r}, "
                "not a section; there is nothing below it to set"
            )
        node = child
    node[last] = _parse_yaml(text, f"override {override!r}")


_FRIENDLY = {
    "missing": "missing; it has no default and must be set",
    "union_tag_not_found": "needs a `kind`",
}


def _explain(problem: Any, values: dict[str, Any]) -> str:
    """Describe one pydantic error in a line: where, what was found, what was expected."""
    location = [str(part) for part in problem["loc"]]
    path = ".".join(_without_union_tags(location, values))
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
        return f"{path}.kind: {context['tag']!r} is not one of {', '.join(_tags(context))}{hint}"
    if kind in _FRIENDLY:
        return f"{path}: {_FRIENDLY[kind]}"
    message = message[0].lower() + message[1:]
    return f"{path}: {message}; got {problem['input']!r} ({type(problem['input']).__name__})"


def _tags(context: dict[str, Any]) -> list[str]:
    return re.findall(r"'([^']+)'", str(context["expected_tags"]))


def _without_union_tags(location: Sequence[str], values: dict[str, Any]) -> list[str]:
    """Drop the union tags that pydantic puts into locations: they are not keys of the file."""
    path: list[str] = []
    node: Any = values
    for position, part in enumerate(location):
        is_last = position == len(location) - 1
        if isinstance(node, dict) and part not in node and node.get("kind") == part and not is_last:
            continue
        path.append(part)
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            node = None
    return path


def _nearest(location: Sequence[str], problem: Any) -> str:
    known = sorted(_known_keys(location[:-1]))
    close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known keys here: {', '.join(known)}"


def _known_keys(location: Sequence[str]) -> set[str]:
    """Return the schema's keys at a pydantic error location, which includes union tags."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"]
    nodes = [schema]
    for part in location:
        reached: list[dict[str, Any]] = []
        for node in nodes:
            for option in _options(node, definitions):
                properties = option.get("properties", {})
                if part in properties:
                    reached.append(properties[part])
                elif properties.get("kind", {}).get("const") == part:
                    reached.append(option)
                elif part.isdigit() and "items" in option:
                    reached.append(option["items"])
        nodes = reached
    return {
        key
        for node in nodes
        for option in _options(node, definitions)
        for key in option.get("properties", {})
    }


def _options(node: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """Resolve references and unions: return the object schemas a schema node stands for."""
    if "$ref" in node:
        return _options(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions)
    branches = node.get("oneOf") or node.get("anyOf")
    if branches:
        return [option for branch in branches for option in _options(branch, definitions)]
    return [node]
