"""A rollout process whose vLLM takes itself for one of a GPU, on a machine without FlashInfer."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from qwen3_distill.generation.vllm import compat
from qwen3_distill.generation.vllm.settings import VllmSettings
from qwen3_distill.generation.vllm.worker import VllmWorker
from qwen3_distill.hosts.serve import serve_worker

if __name__ == "__main__":
    compat.is_cpu = lambda: False
    for number, largest in ((512, None), (1024, 1024)):
        arguments = compat.engine_arguments(
            VllmSettings(
                model_dir="student",
                dtype="bfloat16",
                eos_ids=(1,),
                max_sequences=number,
                max_model_tokens=64,
                kv_cache_bytes=1 << 20,
                stream_interval=1,
                lora_rank=None,
            )
        )
        assert arguments.get("max_cudagraph_capture_size") == largest, number
    for name in ("flash_attn", "triton"):  # what is passed on is a name of vLLM's
        assert compat._attention(name) in AttentionBackendEnum.__members__, name
    assert "FLASHINFER" in AttentionBackendEnum.__members__
    serve_worker(VllmWorker())
