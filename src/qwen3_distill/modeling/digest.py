"""Digests of weights, computed on the device that holds them, and of model directories."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from qwen3_distill.modeling.directory import weight_files

_COLUMNS = 1 << 12
_K = 0x1E3779B97F4A7C15
_FILE_CHUNK_BYTES = 1 << 24
_INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_digest(weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Hex digest over names, shapes, dtypes and every bit of the tensors, in any order.

    An iterable is consumed one tensor at a time, so weights that are merged for it are never all in
    memory.

    Each tensor is reduced to a position-dependent 64-bit sum of its words w_i (a multilinear hash):
    the sum of w_i (2 K i + 1) modulo 2^64. Odd multipliers are invertible there, so a change of one
    word always changes the sum. The digest detects accidents, such as a stale or half-copied
    tensor; it does not resist an adversary.
    """
    heads, sums = list[str](), list[_WordSums]()
    for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
        heads.append(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|")
        sums.append(_word_sums(tensor.detach()))
    outer = hashlib.sha256()
    for head, checksum in sorted(zip(heads, map(_checksum, _to_host(sums)), strict=True)):
        outer.update(head.encode())
        outer.update(checksum.to_bytes(8, "little", signed=True))
    return outer.hexdigest()[:16]


class _WordSums(NamedTuple):
    """Row and column sums of a tensor's words: word i is at row r, column c with i = C r + c.

    For a checksum the device only reads the words twice, in two kernels (and one for the
    remainder). A model has hundreds of tensors, and multiplying each word by its position would
    take some twenty kernels and five times the traffic. The host's part is small: C words per
    tensor and one per row.
    """

    of_row_R: Tensor
    """[R] int64 sums of rows, modulo 2^64."""
    of_column_C: Tensor
    """int64, of the whole rows."""
    rest: Tensor
    """int64: the words after them, fewer than C."""


def _word_sums(tensor: Tensor) -> _WordSums:
    words = _words(tensor.contiguous().view(-1))
    num_rows = words.numel() // _COLUMNS
    whole = num_rows * _COLUMNS
    rows_RC = words[:whole].view(num_rows, _COLUMNS)
    return _WordSums(
        rows_RC.sum(1, dtype=torch.int64),
        rows_RC.sum(0, dtype=torch.int64),
        words[whole:].to(torch.int64, copy=True),  # the iterable may use its memory again
    )


def _to_host(sums: Sequence[_WordSums]) -> list[_WordSums]:
    """Copy the sums to the host, in one transfer if all are on one device."""
    parts = [part for of_tensor in sums for part in of_tensor]
    if len({part.device for part in parts}) == 1:
        parts = torch.cat(parts).cpu().split([part.numel() for part in parts])
    on_host = [part.cpu() for part in parts]
    return [_WordSums(*on_host[start : start + 3]) for start in range(0, len(on_host), 3)]


def _checksum(sums: _WordSums) -> int:
    """The sum over i of w_i (2 K i + 1), signed: here i = C r + c."""
    row_R, column_C, rest_N = (part.numpy() for part in sums)  # numpy wraps modulo 2^64, too
    whole = _COLUMNS * row_R.size
    at_positions = (
        _COLUMNS * int(row_R @ np.arange(row_R.size))
        + int(column_C @ np.arange(_COLUMNS))
        + int(rest_N @ np.arange(whole, whole + rest_N.size))
    )
    value = 2 * _K * at_positions + int(row_R.sum()) + int(rest_N.sum())
    return (value + 2**63) % 2**64 - 2**63


def _words(flat: Tensor) -> Tensor:
    """The bits as 64-bit words if they divide into them (a quarter of the work of 16-bit words),
    else as one integer per element."""
    width = flat.element_size()
    if flat.numel() * width % 8 == 0:
        if flat.storage_offset() * width % 8:
            flat = flat.clone()  # a view that begins inside a word
        return flat.view(torch.int64)
    return flat.view(_INTEGER_OF_WIDTH[width])


def directory_digest(directory: str | Path) -> str:
    """SHA-256, in hex, over the names and contents of ``config.json`` and the weights' files.

    It names the weights as stored, whatever precision they are served in. Files are hashed
    concurrently; an unchanged directory is hashed once per process.
    """
    root = Path(directory)
    paths = sorted([root / "config.json", *weight_files(root)])
    stats = [path.stat() for path in paths]
    return _files_digest(
        tuple(
            (str(path), stat.st_size, stat.st_mtime_ns)
            for path, stat in zip(paths, stats, strict=True)
        )
    )


@cache
def _files_digest(files: tuple[tuple[str, int, int], ...]) -> str:
    outer = hashlib.sha256()
    paths = [Path(path) for path, _, _ in files]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        for path, digest in zip(paths, threads.map(_file_digest, paths), strict=True):
            outer.update(f"{path.name}|".encode() + digest)
    return outer.hexdigest()


def _file_digest(path: Path) -> bytes:
    inner = hashlib.sha256()  # lets other threads run while it hashes
    with path.open("rb") as file:
        while chunk := file.read(_FILE_CHUNK_BYTES):
            inner.update(chunk)
    return inner.digest()


def are_of_directory(weights: Mapping[str, Tensor], model_dir: str | Path) -> bool:
    """Whether the weights equal those of a model directory, up to the dtype of its files.

    A tied output head (``lm_head.weight``) need not be in the directory.
    """
    found: set[str] = set()
    for file in weight_files(Path(model_dir)):
        with safe_open(file, framework="pt") as handle:
            for name in weights.keys() & set(handle.keys()):
                stored, given = handle.get_tensor(name), weights[name].detach()
                if not torch.equal(stored.to(given.device), given.to(stored.dtype)):
                    return False
                found.add(name)
    return bool(found) and not weights.keys() - found - {"lm_head.weight"}
