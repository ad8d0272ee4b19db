"""The settings that the vLLM worker is opened with. Both sides import this: no numpy, no vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_VLLM_LARGEST_GRAPH = 512
_GRAPH_STEP = 16
"""Sizes are multiples of it, from 256 on."""
_GRAPH_SIZES = frozenset({"max_cudagraph_capture_size", "cudagraph_capture_sizes"})


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """One vLLM engine."""

    model_dir: str
    dtype: str
    eos_ids: tuple[int, ...]
    max_sequences: int
    max_model_tokens: int
    kv_cache_bytes: int
    stream_interval: int
    lora_rank: int | None
    """Highest rank of the adapters it serves; None: whole weights are loaded instead."""
    tensor_parallel: int = 1
    """Cards that the model is divided over."""
    keeps_cache: bool = True
    """Whether running rollouts keep their keys and values when new weights come."""
    kv_cache_dtype: str = "auto"
    attention_backend: str | None = None
    max_batched_tokens: int | None = None
    quantization: str | None = None
    float32_head: bool = False
    enforce_eager: bool = False
    seed: int = 0
    num_candidates: int = 0
    """Most likely tokens that a request may ask for."""
    hang_timeout_s: float = 900.0
    """Time after which an engine counts as lost if no running rollout gets a token."""
    engine_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further ``AsyncEngineArgs``; they win over all of the above."""

    @property
    def largest_graph(self) -> int | None:
        """Size of the largest CUDA graph that vLLM must be asked for; None: it makes enough.

        By itself it makes none for more than 512 sequences, and decodes larger batches without.
        """
        compilation = self.engine_arguments.get("compilation_config")
        given = {*self.engine_arguments, *(compilation if isinstance(compilation, dict) else ())}
        if self.enforce_eager or self.max_sequences <= _VLLM_LARGEST_GRAPH or given & _GRAPH_SIZES:
            return None
        return -(-self.max_sequences // _GRAPH_STEP) * _GRAPH_STEP
