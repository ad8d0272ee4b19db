"""The segments in which PyTorch takes a CUDA device's memory for a learner: growing or fixed ones.

Of a fixed segment (`cudaMalloc`) a part that is in use holds the rest, which is then too small for
other tensors. Micro-batches of many shapes, and weights that are made between steps, leave
gigabytes of such rests (docs/engines/memory.md). A growing segment ("expandable") maps pages where
they are needed, and gives any of them back.

A growing segment cannot be lent by CUDA IPC without a privilege that containers rarely have. So
what may be lent is made within `lendable`: PyTorch takes nothing there from growing segments.
"""

import contextlib
import os
import re
from collections.abc import Iterator

import torch

_GROWING = re.compile(r",?\s*expandable_segments:(\w+)")
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_PROBE_BYTES = 64 << 20


def grow_segments(device: torch.device) -> None:
    """Have new memory of this process taken in segments that grow, if the device has them.

    Whoever set the choice in the environment has made it.
    """
    if device.type != "cuda" or any(_GROWING.search(os.environ.get(v, "")) for v in _VARIABLES):
        return
    before = _settings()
    _set(_with_growth(before, on=True))
    torch.cuda.empty_cache()  # the probe must be new memory
    try:
        torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=device)
    except RuntimeError:  # on some platforms (WSL, Tegra) the driver has no such mapping
        _set(before)


@contextlib.contextmanager
def lendable() -> Iterator[None]:
    """Make new tensors in memory that CUDA IPC can lend to another process."""
    before = _settings()
    if not _grows(before):
        yield
        return
    _set(_with_growth(before, on=False))
    try:
        yield
    finally:
        _set(before)


def describe_segments() -> str:
    """Which segments new memory is taken in, for people."""
    return "growing" if _grows(_settings()) else "fixed"


def _grows(settings: str) -> bool:
    found = _GROWING.search(settings)
    return found is not None and found[1].lower() in ("true", "1")


def _with_growth(settings: str, *, on: bool) -> str:
    """The settings with another choice of segments: PyTorch resets what a new value leaves out."""
    others = _GROWING.sub("", settings).lstrip(", ")
    return ",".join(filter(None, [others, f"expandable_segments:{on}"]))


# PyTorch has no public function for either. Its own error, where growing memory cannot be lent,
# names the second one.


def _settings() -> str:
    read = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if read is not None:
        return read()
    return next((os.environ[name] for name in _VARIABLES if name in os.environ), "")


def _set(settings: str) -> None:
    write = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if write is None:
        write = torch.cuda.memory._set_allocator_settings
    write(settings)
    if not hasattr(torch._C, "_accelerator_getAllocatorSettings"):
        os.environ[_VARIABLES[0]] = settings
