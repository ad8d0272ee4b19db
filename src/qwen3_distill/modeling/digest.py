"""A digest of weights, computed where the weights are."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_CHUNK = 1 << 22
_INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Hex digest over names, shapes, dtypes and every bit of the tensors.

    Each tensor is reduced on its own device by a position-dependent 64-bit sum (a multilinear
    hash), so that weights on a GPU are not copied to the host. It tells accidents apart, such as
    a stale or half-copied tensor; it does not resist an adversary.
    """
    outer = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        outer.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        outer.update(_checksum(tensor.detach()).to_bytes(8, "little", signed=True))
    return outer.hexdigest()[:16]


def _checksum(tensor: Tensor) -> int:
    bits = tensor.contiguous().view(-1).view(_INTEGER_OF_WIDTH[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        position = torch.arange(start, start + chunk.numel(), device=tensor.device)
        # Odd multipliers are invertible modulo 2^64: a change of one element always shows.
        multiplier = position * 0x1E3779B97F4A7C15 * 2 + 1
        total += (chunk * multiplier).sum()
    return int(total.item())
