"""A rollout process whose vLLM cannot pause: an older version, as the worker sees it."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from qwen3_distill.generation.vllm.worker import AsyncLLM, VllmWorker
from qwen3_distill.hosts.serve import serve_worker

if __name__ == "__main__":
    for owner in AsyncLLM.__mro__:  # its protocol names the method too
        if "pause_generation" in vars(owner):
            del owner.pause_generation
    serve_worker(VllmWorker())
