"""Reads YAML 1.2, where PyYAML reads YAML 1.1."""

import re
from typing import Any

import yaml
from yaml.composer import ComposerError

from qwen3_distill.errors import ConfigError


def parse_yaml(text: str, where: str) -> Any:
    """Return the value that a YAML 1.2 text holds.

    Raises:
        ConfigError: it is not valid YAML, has a key twice, or has a key that is no text.
    """
    try:
        return yaml.load(text, Loader=_Yaml12Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a malformed number such as 0x_
        raise ConfigError(f"{where}: not valid YAML: {' '.join(_reason(error).split())}") from None


def _reason(error: Exception) -> str:
    """Say what is wrong and where; the line itself is left out: it may hold a secret."""
    if isinstance(error, yaml.MarkedYAMLError):
        for mark in (error.context_mark, error.problem_mark):
            if mark is not None:
                mark.buffer = None
    return str(error)


class _Yaml12Loader(yaml.SafeLoader):
    """Reads YAML 1.2 and refuses a key that is set twice.

    PyYAML itself reads YAML 1.1: ``1e-5`` is a string, ``off`` and ``no`` are booleans, ``010`` is
    eight, ``1:30`` is ninety, ``2024-11-25`` is a date, ``=`` is no text, and the last of two
    equal keys counts.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen: set[str] = set()
        for key in keys:
            if key.value in seen:
                raise ComposerError(None, None, f"{key.value!r} is set twice", key.start_mark)
            if key.tag not in (_TEXT, _MERGE):
                raise ComposerError(
                    None, None, f"key {key.value} is no text; quote it", key.start_mark
                )
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
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in (*_YAML_12, "timestamp", "value")}
_Yaml12Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _letters) in _YAML_12.items():
    _Yaml12Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_letters)
    )
_Yaml12Loader.add_constructor("tag:yaml.org,2002:int", _Yaml12Loader.construct_yaml_int)
_Yaml12Loader.add_constructor(_MERGE, _Yaml12Loader.construct_yaml_str)  # ``<<`` as a value
