"""Leaves secrets out of what is written of a config, and refuses to run on what was left out."""

from collections.abc import Iterator
from typing import Any

from qwen3_distill.utils.secrets import HIDDEN, is_secret_name, without_user

NOT_RECORDED = "(not recorded)"
_VARIABLES = "environment"
_ARGUMENTS = ("engine_arguments", "server_arguments")


def recordable(values: dict[str, Any]) -> dict[str, Any]:
    """Return a config's values as files, trackers and reports may hold them.

    The values of environment variables, users and passwords in URLs, and engine arguments with the
    name of a secret are replaced. Applied to its own result it changes nothing.
    """
    return _without_secrets(values, inside=None)


def not_recorded(values: dict[str, Any]) -> list[str]:
    """List the settings whose values were left out of a config by `recordable`."""
    return [path for path, value in _texts(values, "") if _is_left_out(value)]


def may_be_secret(keys: tuple[str, ...]) -> bool:
    """Whether the value at these keys of a config, or one below it, may be a secret."""
    return any(key == _VARIABLES or is_secret_name(key) for key in keys)


def _without_secrets(value: Any, inside: str | None) -> Any:
    if isinstance(value, dict):
        return {key: _member(key, child, inside) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(child, inside) for child in value]
    return without_user(value) if isinstance(value, str) else value


def _member(key: str, child: Any, inside: str | None) -> Any:
    is_leaf = not isinstance(child, dict | list | tuple) and child is not None
    if is_leaf and (inside == _VARIABLES or (inside in _ARGUMENTS and _is_secret(key, child))):
        return NOT_RECORDED
    sections = (_VARIABLES, *_ARGUMENTS)
    return _without_secrets(child, key if inside is None and key in sections else inside)


def _is_secret(name: str, value: Any) -> bool:
    return isinstance(value, str) and is_secret_name(name)


def _is_left_out(value: str) -> bool:
    return value == NOT_RECORDED or f"{HIDDEN}@" in value


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from _texts(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _texts(child, path)
