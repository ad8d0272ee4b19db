"""Odd values and mutations that several kinds share."""

import copy
import random
from typing import Any

ODD_TEXTS = (
    *("", " ", "~", "null", "true", "no", "0x_", "1e400", "-1e400", ".nan", ".inf", "-0.0"),
    *("1_000", "0o7", "5e-324", "1e308", "1e9", "100000", "99999999999999999999", "9" * 4400),
    *(
        "\x1b[31m",
        "\u202e",
        "\ud800",
        "\0",
        "\U0001f600",
        "../../x",
        "/",
        "~/x",
        "$HOME",
        "a" * 5000,
    ),
    *("[", "{", "- ", "? ", "&a", "*a", "!!int", "!x", "@", "`", "%", "|", ">", "'", '"', "#", ":"),
)


def deep(levels: int) -> Any:
    """Nest lists and objects."""
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def odd_value(rng: random.Random) -> Any:
    """Return a value of JSON that is hardly what is expected."""
    return rng.choice(
        [
            None,
            True,
            False,
            0,
            -1,
            1,
            4.7,
            1e308,
            -1e308,
            5e-324,
            2**31,
            2**63,
            10**30,
            10**400,
            [],
            {},
            [[]],
            [1, "a", None],
            {"a": {"b": []}},
            {"": 1},
            [1] * 200,
            deep(rng.choice([5, 40, 90])),
            rng.choice(ODD_TEXTS),
        ]
    )


def mutated_json(rng: random.Random, value: Any) -> Any:
    """Return a copy with a value replaced, removed, doubled or moved."""
    value = copy.deepcopy(value)
    places = _places(value)
    if not places or rng.random() < 0.05:
        return odd_value(rng)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        node, key = rng.choice(places)
        try:
            match rng.randrange(6):
                case 0:
                    del node[key]
                case 1:
                    node[key] = [node[key]]
                case 2 if isinstance(node, dict):
                    node[str(odd_value(rng))[:50]] = node.pop(key)
                case 3 if type(node[key]) in (int, float):
                    node[key] = rng.choice([-node[key], node[key] * 1e300, str(node[key]), True])
                case _:
                    node[key] = odd_value(rng)
        except (KeyError, IndexError, OverflowError):
            continue
    return value


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """Return content with bytes changed, removed, doubled or cut off."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if data:
                data[min(at, len(data) - 1)] = rng.randrange(256)
            case 1:
                del data[at : at + rng.choice([1, 4, 100])]
            case 2:
                data[at:at] = rng.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")
            case 3:
                data[at:at] = data[at : at + rng.choice([1, 20, 400])]
            case 4 if rng.random() < 0.3:
                del data[at:]
            case _:
                data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 4])))
    return bytes(data)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """List every container with each of its keys."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        pairs: list[tuple[Any, Any]] = []
        if isinstance(node, dict):
            pairs = list(node.items())
        elif isinstance(node, list):
            pairs = list(enumerate(node))
        for key, inner in pairs:
            found.append((node, key))
            waiting.append(inner)
    return found
