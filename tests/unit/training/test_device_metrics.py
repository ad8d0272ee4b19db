"""A step's metrics have the memory that it took, and count what may have stopped it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3_distill.training.device_metrics import compiled_graphs, device_metrics


def test_a_cpu_has_none() -> None:
    assert device_metrics(torch.device("cpu")) == ()


def test_a_gpus_are_its_memory_and_what_stops_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, Any] = {
        "memory_stats": {"num_alloc_retries": 3},
        "max_memory_allocated": 2 << 30,
        "max_memory_reserved": 3 << 30,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    found = {metric.key: metric.total for metric in device_metrics(torch.device("cuda"))}
    assert found.pop("train/compiled_graphs") == compiled_graphs()
    assert found == {
        "train/peak_memory_gib": 2.0,
        "train/held_memory_gib": 3.0,
        "train/allocator_retries": 3,
    }


def test_a_graph_counts_each_time_that_it_is_compiled() -> None:
    compiled: Any = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    x: Tensor = torch.zeros(2)
    compiled(x)
    before = compiled_graphs()
    compiled(x)
    assert compiled_graphs() == before
    compiled(torch.zeros(3))
    assert compiled_graphs() == before + 1
