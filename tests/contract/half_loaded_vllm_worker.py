"""A rollout process with a fault: the last of its cards keeps the weights of its first load."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from typing import Any

from qwen3_distill.generation.vllm.extension import WeightAccess, compat
from qwen3_distill.hosts.serve import serve_worker


class HalfLoaded(WeightAccess):
    rank: int
    parallel_config: Any

    def distill_load_full(self, request: str) -> str:
        if self._in_use is not None and self.rank == self.parallel_config.world_size - 1:
            compat.load_full = lambda runner, weights: None
        return super().distill_load_full(request)


if __name__ == "__main__":
    from qwen3_distill.generation.vllm.worker import VllmWorker

    compat.EXTENSION = f"tests.contract.half_loaded_vllm_worker.{HalfLoaded.__name__}"
    serve_worker(VllmWorker())
