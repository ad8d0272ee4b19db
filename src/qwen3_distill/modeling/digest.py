"""A digest of weights, computed where the weights are."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_CHUNK = 1 << 22
_COLUMNS = 1 << 12
_K = 0x1E3779B97F4A7C15
_FILE_CHUNK_BYTES = 1 << 24
_INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_digest(weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Hex digest over names, shapes, dtypes and every bit of the tensors, in any order.

    Of an iterable, one tensor is held at a time: weights that are merged for it need no memory of
    their own.

    Each tensor is reduced on its own device by a position-dependent 64-bit sum (a multilinear
    hash), so that weights on a GPU are not copied to the host. It tells accidents apart, such as
    a stale or half-copied tensor; it does not resist an adversary.
    """
    heads, scalars = list[str](), list[Tensor]()
    for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
        heads.append(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|")
        scalars.append(_checksum(tensor.detach()))
    outer = hashlib.sha256()
    for head, checksum in sorted(zip(heads, _read(scalars), strict=True)):
        outer.update(head.encode())
        outer.update(checksum.to_bytes(8, "little", signed=True))
    return outer.hexdigest()[:16]


def _read(scalars: list[Tensor]) -> list[int]:
    """In one transfer where they are on one device: a model has hundreds of tensors."""
    if len({scalar.device for scalar in scalars}) == 1:
        return torch.stack(scalars).tolist()
    return [int(scalar) for scalar in scalars]


def _checksum(tensor: Tensor) -> Tensor:
    """The sum over all words w_i of w_i (2 K i + 1), modulo 2^64.

    Odd multipliers are invertible modulo 2^64: a change of one word always shows.
    """
    words = _words(tensor.contiguous().view(-1))
    if words.dtype == torch.int64:
        return _weighted_sum(words, 0)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK):  # widened, so in pieces
        total += _weighted_sum(words[start : start + _CHUNK].to(torch.int64), start)
    return total


def _weighted_sum(words: Tensor, start: int) -> Tensor:
    """`_checksum`'s sum over ``words``, the first of which is word number ``start``.

    In rows of C a word stands at i = C r + c, so what is multiplied with positions are the sums of
    rows and of columns. Both read the words and write next to nothing; a product of all words with
    their positions would write and read several times as much as the words themselves.
    """
    num_rows = words.numel() // _COLUMNS
    whole = num_rows * _COLUMNS
    rest = words[whole:]
    total = _at_positions(rest, 1) + rest.sum() * _wrapped(2 * _K * (start + whole) + 1)
    if num_rows:
        rows = words[:whole].view(num_rows, _COLUMNS)
        sum_of_row = rows.sum(1)
        total += _at_positions(sum_of_row, _COLUMNS) + _at_positions(rows.sum(0), 1)
        total += sum_of_row.sum() * _wrapped(2 * _K * start + 1)
    return total


def _at_positions(sums: Tensor, stride: int) -> Tensor:
    """The sum over k of s_k 2 K stride k."""
    count = 1 << max(sums.numel() - 1, 0).bit_length()  # few sizes, so few are kept
    return (sums * _multipliers(count, stride, sums.device)[: sums.numel()]).sum()


@cache
def _multipliers(count: int, stride: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) * _wrapped(2 * _K * stride)


def _wrapped(value: int) -> int:
    """The signed 64-bit integer that ``value`` is modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63


def _words(flat: Tensor) -> Tensor:
    """The bits as 64-bit words where they divide into them, which is a fourth of the work of
    16-bit ones; else element by element."""
    width = flat.element_size()
    if flat.numel() * width % 8 == 0:
        if flat.storage_offset() * width % 8:
            flat = flat.clone()  # a view that begins inside a word
        return flat.view(torch.int64)
    return flat.view(_INTEGER_OF_WIDTH[width])


def directory_digest(directory: str | Path) -> str:
    """SHA-256, in hex, over the names and contents of ``config.json`` and ``*.safetensors``.

    It names the weights as they lie on disk, whatever precision they are served in. Files are
    hashed side by side; a directory that did not change is hashed once in a process.
    """
    root = Path(directory)
    paths = sorted([root / "config.json", *root.glob("*.safetensors")])
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
    """Whether the weights are those that a model directory holds, up to the dtype of its files.

    A tied output head that is given beside the embedding counts as the directory's.
    """
    found: set[str] = set()
    for file in sorted(Path(model_dir).glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in weights.keys() & set(handle.keys()):
                stored, given = handle.get_tensor(name), weights[name].detach()
                if not torch.equal(stored.to(given.device), given.to(stored.dtype)):
                    return False
                found.add(name)
    return bool(found) and not weights.keys() - found - {"lm_head.weight"}
