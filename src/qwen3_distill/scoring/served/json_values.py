"""Reads JSON of a server by type: nothing is converted, and what has another type is a fault.

numpy would read ``false`` as 0.0, ``"-0.5"`` as -0.5 and 4.7 as token 4.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from orjson import loads as _fast_loads
except ImportError:  # slower: 20 us per token with candidates instead of 5
    _fast_loads = json.loads

from qwen3_distill.scoring.served.faults import FaultKind, ReplyError
from qwen3_distill.types import LOGPROB_SLACK_NATS

_ROW_LENGTH = 3
"""A logprob, its token id, and the token's text or null."""


def decoded(reply: bytes) -> Any:
    """Return the value of a reply of JSON in UTF-8.

    Raises:
        ReplyError: it is something else, or nested too deeply.
    """
    try:
        return _fast_loads(reply)
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(reply.decode("utf-8"))  # unlike orjson, it reads NaN
    except RecursionError as error:
        raise ReplyError(FaultKind.GARBAGE, "the reply is nested too deeply") from error
    except ValueError as error:
        raise ReplyError(FaultKind.GARBAGE, f"the reply is not JSON: {error}") from error


def object_of(value: Any, what: str) -> dict[str, Any]:
    """Return the value if it is an object."""
    if type(value) is not dict:
        raise ReplyError(FaultKind.GARBAGE, f"{what} is {_name(value)}, not an object")
    return value


def list_of(value: Any, what: str) -> list[Any]:
    """Return the value if it is a list."""
    if type(value) is not list:
        raise ReplyError(FaultKind.GARBAGE, f"{what} is {_name(value)}, not a list")
    return value


def member(container: dict[str, Any], name: str) -> Any:
    """Return an object's member."""
    if name not in container:
        raise ReplyError(FaultKind.GARBAGE, f"an answer without {name}")
    return container[name]


def columns(rows: Sequence[Any], what: str) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the logprobs, unchecked, and the token ids, checked to be integers, of some rows."""
    if not rows:
        return (), ()
    if set(map(type, rows)) != {list} or set(map(len, rows)) != {_ROW_LENGTH}:
        raise ReplyError(
            FaultKind.GARBAGE, f"{what} are not all rows of a logprob, a token id and a text"
        )
    values, ids, texts = zip(*rows, strict=True)
    integers(ids, what)
    if not set(map(type, texts)) <= {type(None), str}:
        raise ReplyError(FaultKind.GARBAGE, f"{what}: a token's text is neither text nor null")
    return values, ids


def integers(values: Sequence[Any], what: str) -> Sequence[int]:
    """Return the values if all are integers, which booleans and 4.0 are not."""
    if not set(map(type, values)) <= {int}:
        other = next(value for value in values if type(value) is not int)
        raise ReplyError(FaultKind.GARBAGE, f"{what}: a token id is {_name(other)}, not an integer")
    return values


def logprobs_of(values: Sequence[Any], what: str) -> NDArray[np.float32]:
    """Return [N] nats if all values are finite numbers, and none is above 0 by more than rounding.

    Raises:
        ReplyError: a value is missing or not finite, positive, or no number.
    """
    types = set(map(type, values))
    if not types <= {float, int, type(None)}:
        other = next(v for v in values if type(v) not in (float, int, type(None)))
        raise ReplyError(FaultKind.GARBAGE, f"a logprob of {what} is {_name(other)}, not a number")
    try:
        exact = np.array(values, dtype=np.float64)  # None becomes NaN
    except OverflowError as error:
        raise ReplyError(FaultKind.MISSING, f"a logprob of {what} is not finite") from error
    return checked_logprobs(exact, what)


def checked_logprobs(exact: NDArray[np.floating[Any]], what: str) -> NDArray[np.float32]:
    """Return the nats in float32 if all are finite, and none is above 0 by more than rounding.

    Raises:
        ReplyError: a value is not finite, or positive.
    """
    with np.errstate(over="ignore"):  # infinity is found below
        logprobs = exact.astype(np.float32)
    finite = np.isfinite(logprobs)
    if not finite.all():
        bad = int((~finite).sum())
        raise ReplyError(
            FaultKind.MISSING, f"{bad} of {exact.size} logprobs of {what} are not finite"
        )
    if exact.size and exact.max() > LOGPROB_SLACK_NATS:
        raise ReplyError(FaultKind.POSITIVE, f"a logprob of {what} is {exact.max():.4g}, above 0")
    return logprobs


def _name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    names |= {int: "an integer", float: "a number", type(None): "null"}
    return names.get(type(value), "something else")
