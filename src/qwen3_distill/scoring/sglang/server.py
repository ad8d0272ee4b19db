"""The SGLang server that is started here: its options, and what its log says of memory."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from qwen3_distill.config import SglangScoring
from qwen3_distill.scoring.served.server import HOST, EngineServer, Options
from qwen3_distill.scoring.sglang.plugin import COLLECTION, SELECTION, write_plugins

CPU_CACHE_TOKENS = 65536
"""Tokens of the key-value cache on a CPU, where no memory is planned: SGLang's default takes most
of the machine's memory."""
CONTEXT_MARGIN = 8
"""Tokens by which SGLang's longest input is shorter than its context length."""
_MEMORY_POOL = "Memory pool end."
"""How SGLang's log says that weights and cache are allocated. What it allocates later, for a pass,
is outside of its share."""
_SEVERAL_PROCESSES = {
    f"{name}{separator}size"
    for name in ("tp", "dp", "pp", "ep", "tensor-parallel", "data-parallel", "pipeline-parallel")
    for separator in "-_"
} | {"tp", "dp", "pp"}

MemoryFraction: TypeAlias = float | Callable[[], float] | None
"""Share of the free memory that a server takes at its start; None: SGLang's default. A function is
called at every start: at a restart the other engines already hold theirs."""


class SglangServer(EngineServer):
    """A server process.

    Args:
        context_length: tokens of the longest sequence to score.
        max_total_tokens: tokens of the key-value cache; None: SGLang's default.
        log: file that takes the server's output; appended to, readable by this user only.
    """

    kind = "sglang"
    engine = "SGLang"
    module = "sglang.launch_server"
    unknown = re.compile(
        r"(unrecognized arguments: .*|cannot import name .* from 'sglang.*"
        r"|No module named 'sglang\..*)"
    )

    def __init__(
        self,
        config: SglangScoring,
        *,
        context_length: int,
        memory_fraction: MemoryFraction,
        max_total_tokens: int | None,
        log: Path,
    ) -> None:
        super().__init__(config, log=log)
        self._config = config
        self._context_length = context_length
        self._memory_fraction = memory_fraction
        self._planned_fraction: float | None = None
        self._max_total_tokens = max_total_tokens

    @property
    def _server_arguments(self) -> Options:
        return dict(self._config.server_arguments)

    def _has_its_memory(self, text: str) -> bool:
        # With several processes, each on its own card, the log does not tell whose line it is.
        alone = not self._server_arguments.keys() & _SEVERAL_PROCESSES
        return alone and _MEMORY_POOL in text

    def _memory_message(self, text: str) -> str | None:
        if "out of memory" not in text.lower() and "Not enough memory" not in text:
            return None
        planned = (
            f"memory fraction {_or_default(self._planned_fraction)}, cache of "
            f"{_or_default(self._max_total_tokens)} tokens"
        )
        free = re.findall(r"(Load weight \w+)\.[^\n]*?avail mem=([\d.]+) GB", text)
        found = ", ".join(f"{memory} GB free at {what.lower()}" for what, memory in free)
        knob = (
            "raise scoring.memory_fraction: weights and cache do not fit into it"
            if "increase --mem-fraction-static" in text
            else "lower scoring.max_total_tokens, scoring.chunked_prefill_tokens or "
            "scoring.chunk_tokens, or leave more memory free for it"
        )
        return (
            f"the SGLang server ran out of memory. Planned: {planned}. Found: "
            f"{found or 'no figure in its log'}. To change: {knob}"
        )

    def _importable(self, scratch: Path) -> Sequence[Path]:
        # Whoever gives thresholds of their own has chosen.
        given = {name.replace("_", "-") for name in self._server_arguments}
        plugins = [SELECTION] if "gc-threshold" in given else [COLLECTION, SELECTION]
        return [write_plugins(scratch / "plugin", *plugins)]

    def _options(self, port: int) -> Options:
        """Return the entries of the configuration file of ``sglang.launch_server``."""
        config, planned = self._config, self._memory_fraction
        self._planned_fraction = planned() if callable(planned) else planned
        options: Options = {
            "model-path": config.model,
            "host": HOST,
            "port": port,
            "api-key": self.api_key,
            "device": "cuda" if not self.on_cpu else "cpu",
            "dtype": config.dtype,
            # SGLang reserves room for generated tokens; scoring generates none.
            "context-length": self._context_length + CONTEXT_MARGIN,
            "chunked-prefill-size": config.chunked_prefill_tokens,
            # Requests and replies hold token ids only.
            "skip-tokenizer-init": True,
            # `readiness` checks it with a real request.
            "skip-server-warmup": True,
            # Else the scheduler keeps a core busy while it waits for requests.
            "sleep-on-idle": True,
            "grammar-backend": "none",
            # Graphs cost memory and start time; only the teacher's own answers are decoded.
            "disable-decode-cuda-graph": not config.decode_graphs,
            "disable-prefill-cuda-graph": True,
            "enable-fp32-lm-head": config.float32_head,
            "log-level-http": "warning",
        }
        optional: dict[str, float | int | str | None] = {
            "quantization": config.quantization,
            "mem-fraction-static": self._planned_fraction,
            "max-total-tokens": self._max_total_tokens,
            "attention-backend": config.attention_backend,
        }
        options |= {name: value for name, value in optional.items() if value is not None}
        if self.on_cpu:
            # SGLang has no kernels of its own for every CPU; PyTorch's work on all.
            options = {
                "attention-backend": "torch_native",
                "sampling-backend": "pytorch",
                "mem-fraction-static": 0.2,
                "max-total-tokens": CPU_CACHE_TOKENS,
            } | options
        return options | self._server_arguments

    def _variables(self) -> dict[str, str]:
        variables = {
            # A health check that generates would wait behind a long prefill and fail.
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
            "SGLANG_HEALTH_CHECK_TIMEOUT": "120",
            "SGLANG_LOGPROB_CHUNK_SIZE": str(self._config.chunk_tokens),
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if self.on_cpu:
            variables["SGLANG_USE_CPU_ENGINE"] = "1"
        return variables


def _or_default(value: float | None) -> str:
    return "SGLang's default" if value is None else f"{value:g}"
