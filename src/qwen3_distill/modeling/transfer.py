"""From the host's memory to a device's."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``, without a wait for the work that the device has before it.

    A copy from pageable memory waits for all of it: between two micro-batches the device would
    then have nothing to do until the host has queued the next one's first kernels.
    """
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
