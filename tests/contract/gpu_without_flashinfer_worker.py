"""A rollout process whose vLLM takes itself for one of a GPU, on a machine without FlashInfer."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from dataclasses import fields

import vllm
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from qwen3_distill.generation.vllm import compat
from qwen3_distill.generation.vllm.worker import VllmWorker
from qwen3_distill.hosts.serve import serve_worker

if __name__ == "__main__":
    compat.is_cpu = lambda: False
    # A name that vLLM lacked would be refused when a GPU's engine starts.
    assert "max_cudagraph_capture_size" in {field.name for field in fields(vllm.AsyncEngineArgs)}
    for name in ("flash_attn", "triton"):  # what is passed on is a name of vLLM's
        assert compat._attention(name) in AttentionBackendEnum.__members__, name
    assert "FLASHINFER" in AttentionBackendEnum.__members__
    serve_worker(VllmWorker())
