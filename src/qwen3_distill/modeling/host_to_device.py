"""From the host's memory to a device's."""

import torch
from torch import Tensor

_MOST_PINNED_BYTES = 64 << 20
"""PyTorch never gives pinned memory back, and the host may run a whole step ahead."""


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``, without a wait for the work that the device has before it.

    A copy from pageable memory waits for all of it: between two micro-batches the device would
    then have nothing to do until the host has queued the next one's first kernels. What is large,
    a teacher's hidden states, is copied that way all the same.
    """
    is_small = values.numel() * values.element_size() <= _MOST_PINNED_BYTES
    if device.type == "cuda" and values.device.type == "cpu" and is_small:
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
