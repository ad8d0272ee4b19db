"""Odd JSON: changes to a valid value or to its text, drawn from a seeded generator."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

DEPTH = 100_000
ODD_TEXTS = (
    *("", "-0.5", "0", "4", "NaN", "null", "\x1b[2J\x1b]0;title\x07", "\u202e\u2066", "\ud800"),
    *("\x00", "a" * 5000, "é" * 50, "true"),
)
ODD_NUMBERS = (
    *(0, 0.0, -0.0, 1, -1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 1e308, -1e308),
    *(5e-324, -1e39, 4.7, 4.0, 1e-4, 0.5, float("nan"), float("inf"), -float("inf")),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [None], [{}], {"0": 1}, [-8.7], {"a": {"a": {}}}),
    *(*ODD_NUMBERS, *ODD_TEXTS),
)
_MOST = 1e300
Place = tuple[Any, Any]
"""A container and the key or index of one of its values."""


def mutated(value: Any, rng: random.Random, secret: str) -> bytes:
    """Return the text of a value after one to three changes.

    Args:
        secret: put into some texts, as a server may that sends a request's headers back.
    """
    value = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(_CHANGES)(value, rng, secret)
    text = json.dumps(value[0]) if rng.random() < 0.8 else json.dumps(value[0], indent=1)
    if rng.random() < 0.25:
        return rng.choice(_TEXT_CHANGES)(text, rng)
    return text.encode()


def _places(root: Any) -> list[Place]:
    found: list[Place] = []
    stack = [root]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], dict | list):
                stack.append(node[key])
    return found


def _place(root: Any, rng: random.Random) -> Place:
    return rng.choice(_places(root))


def _numbers(root: Any) -> list[Place]:
    return [
        (node, key)
        for node, key in _places(root)
        if isinstance(node[key], int | float) and not isinstance(node[key], bool)
    ]


def _odd_value(root: Any, rng: random.Random, secret: str) -> None:
    node, key = _place(root, rng)
    node[key] = copy.deepcopy(rng.choice((*ODD_VALUES, f"Bearer {secret}", secret[:12])))


def _odd_number(root: Any, rng: random.Random, secret: str) -> None:
    if not (places := _numbers(root)):
        return
    node, key = rng.choice(places)
    old = node[key] if abs(node[key]) < _MOST else 1
    node[key] = rng.choice(
        (str(old), [old], {"0": old}, bool(old), False, -old, old + 0.5, None, *ODD_NUMBERS)
    )


def _every_number(root: Any, rng: random.Random, secret: str) -> None:
    """Replace all logprobs, or all ids, alike: a teacher that sends ``false`` everywhere."""
    kind = rng.choice((float, int))
    change: Callable[[Any], Any] = rng.choice(
        (str, bool, lambda old: [old], lambda old: False, float, lambda old: {"0": old})
    )
    for node, key in _numbers(root):
        if type(node[key]) is kind and abs(node[key]) < _MOST:
            node[key] = change(node[key])


def _remove(root: Any, rng: random.Random, secret: str) -> None:
    node, key = _place(root, rng)
    if node is not root:
        del node[key]


def _repeat(root: Any, rng: random.Random, secret: str) -> None:
    node, key = _place(root, rng)
    if isinstance(node, list) and node is not root:
        node.insert(key, copy.deepcopy(node[key]))


def _exchange(root: Any, rng: random.Random, secret: str) -> None:
    (a, i), (b, j) = _place(root, rng), _place(root, rng)
    first, second = copy.deepcopy(a[i]), copy.deepcopy(b[j])
    a[i] = second
    if a is b or any(node is b for node, _ in _places(root)):
        b[j] = first


def _wrap(root: Any, rng: random.Random, secret: str) -> None:
    node, key = _place(root, rng)
    node[key] = rng.choice(([node[key]], {"a": node[key]}, [node[key], None]))


def _unwrap(root: Any, rng: random.Random, secret: str) -> None:
    node, key = _place(root, rng)
    inner = node[key]
    if isinstance(inner, list | dict) and inner:
        node[key] = rng.choice(list(inner.values()) if isinstance(inner, dict) else inner)


def _as_keys(root: Any, rng: random.Random, secret: str) -> None:
    """Turn a list into an object with its values as keys: iterating reads the keys."""
    node, key = _place(root, rng)
    if isinstance(node[key], list):
        node[key] = {json.dumps(child): index for index, child in enumerate(node[key])}


def _rename(root: Any, rng: random.Random, secret: str) -> None:
    node, key = _place(root, rng)
    if isinstance(node, dict):
        node[rng.choice((*ODD_TEXTS, secret, str(key).upper()))] = node.pop(key)


def _abort(root: Any, rng: random.Random, secret: str) -> None:
    for node, key in _places(root):
        if key == "finish_reason":
            message = rng.choice((*ODD_VALUES, secret, f"\x1b[31m{secret}"))
            node[key] = {"type": rng.choice(("abort", "abort", ["abort"])), "message": message}


_CHANGES: tuple[Callable[[Any, random.Random, str], None], ...] = (
    *(_odd_value, _odd_value, _odd_number, _odd_number, _odd_number, _every_number, _remove),
    *(_repeat, _exchange, _wrap, _unwrap, _as_keys, _rename, _abort),
)


def _cut(text: str, rng: random.Random) -> bytes:
    return text.encode()[: rng.randrange(len(text) + 1)]


def _flipped(text: str, rng: random.Random) -> bytes:
    raw = bytearray(text.encode())
    for _ in range(rng.randint(1, 3)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def _other_charset(text: str, rng: random.Random) -> bytes:
    return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le", "cp037")))


def _deep(text: str, rng: random.Random) -> bytes:
    if rng.random() < 0.9:  # the others take no time, and these a few milliseconds each
        return b"[" * 2000 + b"]" * 2000
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}"), ("[", "")))
    return (opening * DEPTH + "0" + closing * DEPTH).encode()


def _long_number(text: str, rng: random.Random) -> bytes:
    return text.replace(
        "-", rng.choice(("-" + "9" * 5000, "-0", "--", "-1e400 ", "-.")), 1
    ).encode()


def _appended(text: str, rng: random.Random) -> bytes:
    return (text + rng.choice((text, ",", "\x00", " \n", "//", "]"))).encode()


_TEXT_CHANGES: tuple[Callable[[str, random.Random], bytes], ...] = (
    *(_cut, _flipped, _flipped, _other_charset, _deep, _long_number, _appended),
)
