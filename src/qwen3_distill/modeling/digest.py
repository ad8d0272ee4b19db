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
    bits = _words(tensor.contiguous().view(-1))
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        position = torch.arange(start, start + chunk.numel(), device=tensor.device)
        # Odd multipliers are invertible modulo 2^64: a change of one element always shows.
        multiplier = position * 0x1E3779B97F4A7C15 * 2 + 1
        total += (chunk * multiplier).sum()
    return total


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
