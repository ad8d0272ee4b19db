"""A rollout process whose vLLM takes itself for one of a GPU, on a machine without FlashInfer."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from qwen3_distill.generation.vllm import compat
from qwen3_distill.generation.vllm.worker import VllmWorker
from qwen3_distill.hosts.serve import serve_worker

if __name__ == "__main__":
    compat.is_cpu = lambda: False
    serve_worker(VllmWorker())
