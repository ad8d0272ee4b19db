"""What a scoring server's reply says, read value by value with no other library than `json`.

The reference that `replies` compares the package's fast reader with. It is slow and plain on
purpose, and shares no code with it.
"""

import binascii
import json
import math
import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

SLACK_NATS = 1e-3
SAME_TOKEN_NATS = 1e-2
_ARRAYS = "input_top_logprobs_shape"
_BASE64 = re.compile("[A-Za-z0-9+/]*={0,2}")
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Asked:
    """A sequence that was sent: its ids from the context's last one on, and where scores belong.

    ``scored`` are places in ``ids`` without its first.
    """

    ids: list[int]
    scored: list[int]


@dataclass(frozen=True)
class Said:
    """Values of the scored tokens: logprobs, and candidates where they were asked for."""

    logprobs: list[float]
    candidate_ids: list[list[int]]
    candidate_logprobs: list[list[float]]


class Odd(Exception):
    """The reply says nothing, or nothing about this sequence."""


def meaning(reply: bytes, asked: list[Asked], k: int | None, vocab_size: int) -> list[Said | None]:
    """Return what the reply says of each sequence; None where it says nothing valid.

    Raises:
        Odd: the whole reply says nothing.
    """
    try:
        value = json.loads(reply.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Odd(type(error).__name__) from error
    if type(value) is not list or len(value) != len(asked):
        raise Odd("another number of sequences")
    return [
        _said_or_none(entry, each, k, vocab_size) for entry, each in zip(value, asked, strict=True)
    ]


def _said_or_none(entry: Any, asked: Asked, k: int | None, vocab_size: int) -> Said | None:
    try:
        return _said(entry, asked, k, vocab_size)
    except Odd:
        return None


def _said(entry: Any, asked: Asked, k: int | None, vocab_size: int) -> Said:
    meta = _get(entry, "meta_info")
    _check_finished(meta)
    rows = _get(meta, "input_token_logprobs")
    _need(type(rows) is list and len(rows) == len(asked.ids))
    logprobs: list[float] = []
    for place, (row, sent) in enumerate(zip(rows, asked.ids, strict=True)):
        value, token = _row(row, vocab_size)
        _need(token == sent or (token == 0 and sent == vocab_size - 1))
        if place == 0:
            _need(value is None)
        else:
            logprobs.append(logprob(value))
    if k is None:
        return Said([logprobs[place] for place in asked.scored], [], [])
    candidates = _candidates(meta, asked, logprobs, k, vocab_size)
    return Said(
        [logprobs[place] for place in asked.scored],
        [[token for _, token in candidates[place]] for place in asked.scored],
        [[value for value, _ in candidates[place]] for place in asked.scored],
    )


def _candidates(
    meta: Any, asked: Asked, logprobs: list[float], k: int, vocab_size: int
) -> list[list[tuple[float, int]]]:
    top = _from_arrays(meta) if _ARRAYS in meta else _get(meta, "input_top_logprobs")
    _need(type(top) is list and len(top) == len(asked.ids) and top[0] is None)
    found: list[list[tuple[float, int]]] = []
    for rows, own, sent in zip(top[1:], logprobs, asked.ids[1:], strict=True):
        _need(type(rows) is list and len(rows) == k)
        pairs = [(logprob(value), token) for value, token in (_row(r, vocab_size) for r in rows)]
        values = [value for value, _ in pairs]
        _need(len({token for _, token in pairs}) == k)
        _need(values == sorted(values, reverse=True))
        among = [value for value, token in pairs if token == sent]
        if among:
            _need(abs(np.float32(among[0]) - np.float32(own)) <= SAME_TOKEN_NATS)
        else:
            _need(np.float32(own) <= np.float32(values[-1]) + np.float32(SAME_TOKEN_NATS))
        found.append(pairs)
    return found


def _from_arrays(meta: Any) -> list[Any]:
    """Return the rows of candidates that are given as arrays, as SGLang's lists have them."""
    shape = _get(meta, _ARRAYS)
    _need(type(shape) is list and len(shape) == 2)
    rows, width = _count(shape[0]), _count(shape[1])
    empty = _count(_get(meta, "input_top_logprobs_null_prefix"))
    values = _numbers(meta, "val", "float32", "f", rows * width)
    ids = _numbers(meta, "idx", "int32", "i", rows * width)
    _need(empty == 1)
    found: list[Any] = [None]
    for row in range(rows):
        places = range(row * width, (row + 1) * width)
        found.append([[values[place], ids[place], None] for place in places])
    return found


def _count(value: Any) -> int:
    _need(type(value) is int and value >= 0)
    return value


def _numbers(meta: Any, which: str, dtype: str, code: str, count: int) -> tuple[Any, ...]:
    name = f"input_top_logprobs_{which}_flat_b64"
    text = _get(meta, name)
    _need(_get(meta, f"{name}_dtype") == dtype)
    _need(type(text) is str and len(text) % 4 == 0 and _BASE64.fullmatch(text) is not None)
    data = binascii.a2b_base64(text)
    _need(len(data) == 4 * count)
    return struct.unpack(f"<{count}{code}", data)


def _check_finished(meta: Any) -> None:
    _need(type(meta) is dict)
    reason = meta.get("finish_reason")
    if reason is not None:
        kind = _get(reason, "type")
        _need(type(kind) is str and kind in ("stop", "length"))


def _row(row: Any, vocab_size: int) -> tuple[Any, int]:
    _need(type(row) is list and len(row) == 3)
    value: Any = row[0]
    token: Any = row[1]
    text: Any = row[2]
    _need(type(token) is int and 0 <= token < vocab_size)
    _need(text is None or type(text) is str)
    return value, token


def logprob(value: Any) -> float:
    """Return a logprob in float32; raise `Odd` if it is none."""
    _need(type(value) in (int, float))
    _need(abs(value) <= LARGEST_FLOAT32 and not math.isnan(value))
    _need(value <= SLACK_NATS)
    return float(np.float32(value))


def _get(container: Any, name: str) -> Any:
    _need(type(container) is dict and name in container)
    return container[name]


def _need(holds: Any) -> None:
    if not holds:
        raise Odd
