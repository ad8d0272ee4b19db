"""Reads YAML 1.2, where PyYAML reads YAML 1.1."""

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from qwen3_distill.errors import ConfigError
from qwen3_distill.utils.shown import shortened, shown

MAX_CHARACTERS = 1 << 18
"""Longest text that is read: a config has some thousand characters."""
MAX_DEPTH = 32
"""Deepest nesting that is read."""
MAX_VALUES = 20_000
"""Most values that are read, each counted as often as aliases repeat it."""


def parse_yaml(text: str, where: str) -> Any:
    """Return the value that a YAML 1.2 text holds.

    Raises:
        ConfigError: it is not valid YAML, has a key twice, has a key that is no text or a tag of
            something else than JSON has, or is larger or nested deeper than any config.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"{where}: has {len(text):,} characters, more than the {MAX_CHARACTERS:,} that are "
            "read; check that it is a config"
        )
    try:
        return yaml.load(text, Loader=_Yaml12Loader)
    except Exception as error:  # noqa: BLE001 - PyYAML's constructors raise many kinds
        reason = " ".join(_reason(error).split()) or type(error).__name__
        raise ConfigError(f"{where}: not valid YAML: {shortened(reason)}") from None


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

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._num_values: dict[yaml.Node, int] = {}
        """Values in a finished node, its own included; an alias is the node again."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ComposerError(
                None, None, f"nested deeper than {MAX_DEPTH} levels", self.peek_event().start_mark
            )
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and node not in self._num_values:  # not finished: it is around us
            raise ComposerError(None, None, "an alias stands inside of its anchor", mark)
        if node is not None and not is_alias:
            self._count_values(node)
        return node

    def _count_values(self, node: yaml.Node) -> None:
        parts: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        self._num_values[node] = 1 + sum(self._num_values[part] for part in parts)
        if self._num_values[node] > MAX_VALUES:
            raise ComposerError(
                None, None, f"more than {MAX_VALUES:,} values, aliases included", node.start_mark
            )

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen: set[str] = set()
        for key in keys:
            if key.value in seen:
                raise ComposerError(None, None, f"{shown(key.value)} is set twice", key.start_mark)
            if key.tag not in (_TEXT, _MERGE):
                raise ComposerError(
                    None, None, f"key {shown(key.value)} is no text; quote it", key.start_mark
                )
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in _TAGS:
            raise ConstructorError(
                None,
                None,
                f"tag {shown(node.tag)} is no type of a setting; drop it",
                node.start_mark,
            )
        pattern = _PATTERNS.get(node.tag)
        if pattern is not None and not pattern.fullmatch(str(node.value)):
            raise ConstructorError(
                None,
                None,
                f"{shown(node.value)} is no value for the tag {node.tag!r}; drop it",
                node.start_mark,
            )
        return super().construct_object(node, deep)

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
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")
}
"""Types that JSON has; ``merge`` is the text ``<<``."""
_PATTERNS = {
    "tag:yaml.org,2002:null": re.compile("~|null|Null|NULL|"),
    **{f"tag:yaml.org,2002:{name}": re.compile(part) for name, (part, _) in _YAML_12.items()},
}
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
