"""Measures what a step of a learner takes of its device, and counts what may have stopped it."""

import sys
from typing import Any

import torch

from qwen3_distill.types import Metric

_GIB = 1 << 30


def device_metrics(device: torch.device) -> tuple[Metric, ...]:
    """Return a step's memory and, since the process began, what stops a step; none on a CPU.

    A graph that is compiled takes seconds. When PyTorch finds no memory within its bound, it frees
    what it holds and asks again, for which it waits for the device.
    """
    if device.type != "cuda":
        return ()
    stats = torch.cuda.memory_stats(device)
    return (
        Metric.max("train/peak_memory_gib", torch.cuda.max_memory_allocated(device) / _GIB),
        Metric.max("train/held_memory_gib", torch.cuda.max_memory_reserved(device) / _GIB),
        Metric.max("train/allocator_retries", stats.get("num_alloc_retries", 0)),
        Metric.max("train/compiled_graphs", compiled_graphs()),
    )


def compiled_graphs() -> int:
    """Return how many graphs `torch.compile` has made in this process, each time that it did."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")  # takes seconds to import
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])
