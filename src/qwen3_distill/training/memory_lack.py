"""Noting a lack of device memory, so that it can be reported with its remedy, or tried again."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass
class MemoryLack:
    """Whether an allocation failed."""

    text: str | None = None
    """The first line of PyTorch's error; None: none failed."""


@contextlib.contextmanager
def memory_lack() -> Iterator[MemoryLack]:
    """Note a lack of memory in the block instead of raising it.

    The caller raises after the block: only then is the failed pass's memory unreferenced.
    """
    lack = MemoryLack()
    try:
        yield lack
    except torch.OutOfMemoryError as error:
        lack.text = str(error).partition("\n")[0]
