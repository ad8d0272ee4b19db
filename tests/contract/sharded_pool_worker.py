"""A process with one rank of a group that divides its weights, which also computes in float64."""

from typing import Any

import torch
import torch.distributed as dist

from qwen3_distill.hosts.serve import serve_worker
from qwen3_distill.training.embedded import student
from qwen3_distill.training.embedded.worker import EmbeddedLearnerWorker
from tests.contract.pool import WorkerPool


class OneRankAtATime(WorkerPool):
    """A process has torch's default group once: a new worker's replaces that of the last one."""

    async def call(self, number: int, method: str, *arguments: Any) -> Any:
        if number not in self._workers and dist.is_initialized():
            dist.destroy_process_group()
        return await super().call(number, method, *arguments)


def dtype_of(name: str) -> torch.dtype:
    """Take float64 as well, which no config may name."""
    return getattr(torch, name)


if __name__ == "__main__":
    student.resolve_dtype = dtype_of
    serve_worker(OneRankAtATime(EmbeddedLearnerWorker, kept=1))
