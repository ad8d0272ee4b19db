"""A rollout process with a fault: from the second load on, what was published changes meanwhile.

So does memory that another process lends and gives to something else too early.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from typing import Any

from qwen3_distill.generation.vllm.extension import WeightAccess, compat
from qwen3_distill.hosts.serve import serve_worker

load_full = compat.load_full


def load_changed(runner: Any, weights: list[tuple[str, Any]]) -> None:
    for _, tensor in weights:
        tensor.add_(0.05)
    load_full(runner, weights)


class Changed(WeightAccess):
    def distill_load_full(self, request: str) -> str:
        if self._in_use is not None:
            compat.load_full = load_changed
        return super().distill_load_full(request)


if __name__ == "__main__":
    from qwen3_distill.generation.vllm.worker import VllmWorker

    compat.EXTENSION = f"tests.contract.changed_vllm_worker.{Changed.__name__}"
    serve_worker(VllmWorker())
