"""Copies to the host: values, order, and how many tensors there are at a time."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qwen3_distill.modeling.device_to_host import to_host


class OnDevice:
    """Stands for a tensor on a device: the first one's copy ends when three more have begun."""

    alive = most = 0
    begun = threading.Semaphore(0)

    def __init__(self, value: int) -> None:
        self.value = value
        OnDevice.alive += 1
        OnDevice.most = max(OnDevice.most, OnDevice.alive)

    def __del__(self) -> None:
        OnDevice.alive -= 1

    def detach(self) -> "OnDevice":
        return self

    def cpu(self) -> Tensor:
        if self.value in (1, 2, 3):
            self.begun.release()
        if self.value == 0:
            assert all(self.begun.acquire(timeout=60) for _ in range(3))
        return torch.tensor(self.value)


def test_copies_are_made_concurrently_and_few_tensors_exist_at_a_time() -> None:
    def made() -> Iterator[tuple[str, OnDevice]]:
        for number in range(40):
            yield f"weight {number}", OnDevice(number)

    copies = to_host(made())  # pyright: ignore[reportArgumentType]
    assert [(name, int(value)) for name, value in copies.items()] == [
        (f"weight {number}", number) for number in range(40)
    ]
    assert OnDevice.most <= 7  # four under way, one that ends, one that waits, one being made


def test_a_copy_that_fails_is_an_error() -> None:
    class Broken(OnDevice):
        def cpu(self) -> Tensor:
            raise torch.OutOfMemoryError("no memory to copy")

    with pytest.raises(torch.OutOfMemoryError, match="no memory to copy"):
        to_host([("weight", Broken(1))])  # pyright: ignore[reportArgumentType]


def test_what_is_on_the_host_is_not_copied() -> None:
    weight = torch.randn(3, requires_grad=True)
    (copy,) = to_host([("weight", weight)]).values()
    assert copy.data_ptr() == weight.data_ptr()
    assert not copy.requires_grad
