"""Reads the most likely tokens that SGLang gives at every place: as arrays in base64, or as lists.

Arrays are asked for: a step has millions of candidates, and lists of them go through three
processes of the server. A server gives lists if it is older than arrays (SGLang 0.5.16), or if
places differ in their number of candidates.

Shape letters: E places, K candidates.
"""

import base64
import binascii
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_distill.scoring.served.checks import within
from qwen3_distill.scoring.served.faults import FaultKind, ReplyError
from qwen3_distill.scoring.served.json_values import (
    checked_logprobs,
    columns,
    integers,
    list_of,
    logprobs_of,
    member,
)

AS_ARRAYS = {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
"""Members of a request that ask for arrays."""
_NAME = "input_top_logprobs"
_DTYPES = {"val": "float32", "idx": "int32"}


def read_candidates(
    meta: dict[str, Any], num_places: int, k: int, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return [E, K] ids and [E, K] nats of the most likely tokens, in the server's order.

    Args:
        meta: an answer's ``meta_info``, whose first place has no candidates.
        num_places: E, without that first one.

    Raises:
        ReplyError: candidates are missing, are not k everywhere, or no tokens and logprobs.
    """
    read = _from_arrays if f"{_NAME}_shape" in meta else _from_lists
    return read(meta, num_places, k, vocab_size)


def _from_arrays(
    meta: dict[str, Any], num_places: int, k: int, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    shape = integers(list_of(member(meta, f"{_NAME}_shape"), "a shape"), "a shape")
    (empty,) = integers([member(meta, f"{_NAME}_null_prefix")], "the places without candidates")
    if len(shape) != 2 or min(*shape, empty) < 0:
        raise ReplyError(FaultKind.GARBAGE, "the candidates are not rows of the same number")
    _check_places(empty + shape[0], num_places)
    if empty < 1:
        raise ReplyError(FaultKind.MISALIGNED, "the first candidates are not null")
    if empty > 1:
        raise ReplyError(FaultKind.MISSING, f"no candidates at {empty - 1} places")
    if shape[1] != k:
        raise ReplyError(FaultKind.CANDIDATES, f"not {k} candidates everywhere")
    ids_EK = _array(meta, "idx", num_places, k).astype(np.int64)
    if ids_EK.min() < 0 or ids_EK.max() >= vocab_size:
        raise ReplyError(FaultKind.CANDIDATES, f"candidates are not ids below {vocab_size}")
    return ids_EK, checked_logprobs(_array(meta, "val", num_places, k), "candidates")


def _array(meta: dict[str, Any], which: str, num_places: int, k: int) -> NDArray[Any]:
    """Return an array of [E, K] numbers, little-endian."""
    name = f"{_NAME}_{which}_flat_b64"
    text, dtype = member(meta, name), member(meta, f"{name}_dtype")
    if dtype != _DTYPES[which] or type(text) is not str:
        raise ReplyError(FaultKind.GARBAGE, f"{name} is not {_DTYPES[which]} in base64")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ReplyError(FaultKind.GARBAGE, f"{name} is not base64: {error}") from error
    numbers = np.dtype(_DTYPES[which]).newbyteorder("<")
    if len(data) != num_places * k * numbers.itemsize:
        raise ReplyError(
            FaultKind.LENGTH,
            f"{name} has {len(data)} bytes for {num_places} places with {k} candidates",
        )
    return np.frombuffer(data, dtype=numbers).reshape(num_places, k)


def _from_lists(
    meta: dict[str, Any], num_places: int, k: int, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    rows = list_of(member(meta, _NAME), _NAME)
    _check_places(len(rows), num_places)
    if rows[0] is not None:
        raise ReplyError(FaultKind.MISALIGNED, "the first candidates are not null")
    if not set(map(type, rows[1:])) <= {list, type(None)}:
        raise ReplyError(FaultKind.GARBAGE, "the candidates of a token are not a list")
    missing = sum(not row for row in rows[1:])
    if missing:
        raise ReplyError(FaultKind.MISSING, f"no candidates at {missing} places")
    if any(len(row) != k for row in rows[1:]):
        raise ReplyError(FaultKind.CANDIDATES, f"not {k} candidates everywhere")
    values, ids = columns(list(chain.from_iterable(rows[1:])), "candidates")
    if not within(ids, vocab_size):
        raise ReplyError(FaultKind.CANDIDATES, f"candidates are not ids below {vocab_size}")
    ids_EK = np.array(ids, dtype=np.int64).reshape(num_places, k)
    return ids_EK, logprobs_of(values, "candidates").reshape(num_places, k)


def _check_places(found: int, num_places: int) -> None:
    if found != num_places + 1:
        raise ReplyError(
            FaultKind.LENGTH, f"candidates at {found} places, expected {num_places + 1}"
        )
