"""The sums over ranks that a learner takes in a step, on torch.distributed.

Unless the ranks divide the weights (`sharding`), a step has no collective inside a forward or
backward pass, so ranks may have any number of micro-batches, also none. Gradients are added, not
averaged: every rank has already divided by the whole step's denominator.
"""

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.device_mesh import DeviceMesh

from qwen3_distill.errors import EngineStartError
from qwen3_distill.training.rank_place import RankPlace

_BUCKET_BYTES = 1 << 28
"""Gradients that are copied together for one sum; bounds the memory of the copy."""


class Ranks:
    """One rank's membership in a group, until `leave`.

    Args:
        place: the rank's place; the constructor returns when all ranks have come.
        device: of the tensors that are summed: NCCL on CUDA, else gloo.

    Raises:
        EngineStartError: the group did not form in time.
    """

    def __init__(self, place: RankPlace, device: torch.device) -> None:
        self.place = place
        self.device = device
        try:
            self._group = _default_group(place, device) if place.sharded else _group(place, device)
            self.add(torch.zeros(1, device=device))  # connects all ranks now, not in a step
        except (RuntimeError, ValueError) as error:  # torch's for all that goes wrong here
            raise EngineStartError(
                f"rank {place.index} of {place.count} did not meet the others at {place.address} "
                f"within {place.timeout_s:g} s: {error}"
            ) from error

    def add(self, values: Tensor) -> Tensor:
        """Replace values by their sum over all ranks, in place; every rank gets the same bits."""
        self._group.allreduce([values]).wait()
        return values

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every parameter's gradient by its sum over all ranks; none counts as zeros."""
        for bucket in _buckets(parameters):
            gradients = [_gradient(parameter) for parameter in bucket]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            parts = self.add(flat).split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def mesh(self) -> DeviceMesh:
        """Return the ranks as a line of devices, over which weights can be divided."""
        return DeviceMesh.from_group(self._group, self.device.type)

    def leave(self) -> None:
        """Leave the group. The other ranks need not have left."""
        if self.place.sharded:
            dist.destroy_process_group()
        else:
            self._group.shutdown()


def _default_group(place: RankPlace, device: torch.device) -> Any:
    """Form torch's default group, which FSDP needs: a process has one such learner."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_store(place),
        rank=place.index,
        world_size=place.count,
        timeout=timedelta(seconds=place.timeout_s),
    )
    return dist.group.WORLD


def _store(place: RankPlace) -> TCPStore:
    host, port = place.address.rsplit(":", 1)
    timeout = timedelta(seconds=place.timeout_s)
    return TCPStore(host, int(port), place.count, is_master=place.index == 0, timeout=timeout)


def _group(place: RankPlace, device: torch.device) -> Any:
    """Form a group of this learner's own: torch's default one exists once per process."""
    timeout = timedelta(seconds=place.timeout_s)
    store = _store(place)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, place.index, place.count, options)
    return dist.ProcessGroupGloo(store, place.index, place.count, timeout)


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield runs of parameters of one dtype, each of at most the bucket's size or one parameter."""
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        full = bucket and size + parameter.nbytes > _BUCKET_BYTES
        if full or (bucket and bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket
