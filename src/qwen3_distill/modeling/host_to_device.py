"""Copies tensors from host memory to a device without waiting for it."""

import torch
from torch import Tensor

_MOST_PINNED_BYTES = 64 << 20
"""PyTorch never gives pinned memory back, and the host may run a whole step ahead."""


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy ``values`` to ``device`` without waiting for the work queued there.

    A copy from pageable memory would wait for it: between two micro-batches the device would then
    be idle until the host has queued the next one's first kernels. Large tensors (a teacher's
    hidden states) are copied from pageable memory all the same.
    """
    is_small = values.numel() * values.element_size() <= _MOST_PINNED_BYTES
    if device.type == "cuda" and values.device.type == "cpu" and is_small:
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
