"""The vLLM server that is started here: its options, and what its log says of memory."""

import re
from pathlib import Path

from qwen3_distill.config import VllmScoring
from qwen3_distill.scoring.served.server import HOST, EngineServer, Options

MIN_LOGPROBS = 20
"""vLLM's default of the candidates that a request may ask for."""
_NO_MEMORY = (
    "out of memory",
    "larger than the available KV cache memory",
    "No available memory for the cache blocks",
    "less than desired GPU memory utilization",
)
"""How vLLM's log says that memory ran out."""


class VllmServer(EngineServer):
    """A server process.

    Its key-value cache has a size in bytes: a share of the memory would count what other engines
    take while it starts as its own.

    Args:
        max_tokens: tokens of the longest sequence to score.
        max_candidates: candidates a token that requests ask for.
        kv_cache_bytes: bytes of the key-value cache.
        log: file that takes the server's output; appended to, readable by this user only.
    """

    kind = "vllm"
    engine = "vLLM"
    module = "vllm.entrypoints.openai.api_server"
    unknown = re.compile(
        r"(unrecognized arguments: .*|cannot import name .* from 'vllm.*"
        r"|No module named 'vllm\..*)"
    )

    def __init__(
        self,
        config: VllmScoring,
        *,
        max_tokens: int,
        max_candidates: int,
        kv_cache_bytes: int,
        log: Path,
    ) -> None:
        super().__init__(config, log=log)
        self._config = config
        self._max_tokens = max_tokens
        self._max_candidates = max_candidates
        self._kv_cache_bytes = kv_cache_bytes

    @property
    def _server_arguments(self) -> Options:
        return dict(self._config.server_arguments)

    def _memory_message(self, text: str) -> str | None:
        if not any(words.lower() in text.lower() for words in _NO_MEMORY):
            return None
        planned = (
            f"a cache of {self._kv_cache_bytes / 2**30:.2f} GiB, for sequences of up to "
            f"{self._max_tokens} tokens"
        )
        knob = (
            "raise scoring.max_total_tokens, or lower scoring.max_model_tokens"
            if "available KV cache memory" in text
            else "lower scoring.max_total_tokens, scoring.max_model_tokens or "
            "scoring.chunked_prefill_tokens, or leave more memory free for it"
        )
        return f"the vLLM server ran out of memory. Planned: {planned}. To change: {knob}"

    def _options(self, port: int) -> Options:
        """Return the entries of the configuration file of ``vllm serve``."""
        config = self._config
        chunk = config.chunked_prefill_tokens
        options: Options = {
            "model": config.model,
            "host": HOST,
            "port": port,
            "dtype": config.dtype,
            # A token is sampled behind the longest sequence, and never read.
            "max-model-len": self._max_tokens + 1,
            "max-num-seqs": config.max_sequences,
            "max-num-batched-tokens": max(chunk, config.max_sequences),
            "kv-cache-memory-bytes": self._kv_cache_bytes,
            # Only compared with what is free at the start.
            "gpu-memory-utilization": 0.05,
            "max-logprobs": max(self._max_candidates, MIN_LOGPROBS),
            # Of sampled tokens; vLLM's default ignores the temperature.
            "logprobs-mode": "processed_logprobs",
            "generation-config": "vllm",
            # Requests and replies hold token ids only.
            "skip-tokenizer-init": True,
            "uvicorn-log-level": "warning",
        }
        if config.quantization is not None:
            options["quantization"] = config.quantization
        if config.float32_head:
            options["hf-overrides"] = {"head_dtype": "float32"}
        if self.on_cpu or not config.decode_graphs:
            options["enforce-eager"] = True
        if self.on_cpu:
            # A seeded request whose prompt is cut by a step's limit ends the engine there.
            options["enable-chunked-prefill"] = False
            options["max-num-batched-tokens"] = max(chunk, self._max_tokens + 1)
        return options | self._server_arguments

    def _variables(self) -> dict[str, str]:
        return {
            # Here rather than in the options, which vLLM writes into its log.
            "VLLM_API_KEY": self.api_key,
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
