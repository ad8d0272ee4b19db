"""Lays tensors that are lent to another process beside one another, in few blocks of memory.

A process that reads lent memory opens each block by a handle of its own and closes it again: with a
block for each of a model's hundreds of matrices that is hundreds of calls of the driver for every
version.
"""

import torch
from torch import Tensor

from qwen3_distill.training.segments import lendable

BLOCK_BYTES = 1 << 30
"""A block has so many: a version in a single one would need as much free memory in one piece."""
_ALIGNMENT = 512
"""PyTorch's own, of every tensor."""


class Shelf:
    """Makes tensors in blocks that CUDA IPC can lend; a block is free when all of its tensors are.

    Args:
        total_bytes: `shelf_bytes` of all tensors that will be made, at the most.
    """

    def __init__(self, total_bytes: int) -> None:
        self._left = total_bytes
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def like(self, values: Tensor) -> Tensor:
        """Return a tensor of the same shape, dtype and device, with any contents."""
        size = shelf_bytes(values.nbytes)
        if self._used + size > self._block.numel():
            with lendable():
                self._block = torch.empty(
                    max(size, min(BLOCK_BYTES, self._left)),
                    dtype=torch.uint8,
                    device=values.device,
                )
            self._used = 0
        place = self._block[self._used : self._used + values.nbytes]
        self._used += size
        self._left -= size
        return place.view(values.dtype).view(values.shape)


def lends(device: torch.device) -> bool:
    """Whether a device's memory can be lent. On a CPU a tensor is sent with its whole block."""
    return device.type == "cuda"


def shelf_bytes(num_bytes: int) -> int:
    """Return the bytes that a tensor of so many takes on a shelf."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
