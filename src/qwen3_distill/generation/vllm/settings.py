"""The settings that the vLLM worker is opened with. Both sides import this: no numpy, no vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3_distill.utils.graph_sizes import largest_graph


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
        """Size of the largest CUDA graph that vLLM must be asked for; None: its own suffice."""
        return largest_graph(self.max_sequences, self.enforce_eager, self.engine_arguments)
