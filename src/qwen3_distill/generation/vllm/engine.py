"""vLLM as a `StreamingRolloutEngine`: the controller's side of the rollout process.

vLLM is not imported here: the process may have an interpreter and an environment of its own.
"""

import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qwen3_distill.config import LoraTuning, VllmGeneration
from qwen3_distill.errors import EngineStartError
from qwen3_distill.generation.hosted import HostedRolloutEngine
from qwen3_distill.generation.vllm.settings import VllmSettings
from qwen3_distill.hosts.child import how_to_install
from qwen3_distill.hosts.process import WorkerProcess
from qwen3_distill.modeling.loading import load_identity

_PROBE_TIMEOUT_S = 60.0
_CAUSE = re.compile(r"\b(\w+(?:Error|Exception): .*)")
_OTHER_VERSION = re.compile(r"(?:Import|ModuleNotFound)Error: (.*\bvllm\..*|.*from 'vllm'.*)")
_OUT_OF_MEMORY = re.compile(
    r"out of memory|memory on device|available memory|KV cache is needed|max seq len", re.I
)
_MODULE = "qwen3_distill.generation.vllm.worker"


class VllmRolloutEngine(HostedRolloutEngine):
    """A `StreamingRolloutEngine` of vLLM.

    Args:
        model_dir: the student; the weights that adapters are added to.
        lora: serve adapters up to this tuning's rank; None: whole weights are loaded.
        kv_cache_bytes: size of the key-value cache.
        log: file that takes the process's output.
    """

    def __init__(
        self,
        model_dir: str | Path,
        config: VllmGeneration,
        *,
        lora: LoraTuning | None,
        kv_cache_bytes: int,
        log: Path,
    ) -> None:
        identity = load_identity(model_dir)
        limit = config.max_model_tokens or identity.context_length
        max_model_tokens = min(limit, identity.context_length)
        worker = WorkerProcess(
            "vLLM",
            python=config.python or sys.executable,
            module=_MODULE,
            log=log,
            environment=config.environment,
            hang_timeout_s=config.hang_timeout_s,
            start_timeout_s=config.start_timeout_s,
        )
        super().__init__(
            worker, max_model_tokens=max_model_tokens, max_restarts=config.max_restarts
        )
        self._config = config
        self._scratch: Path | None = None
        self._settings = VllmSettings(
            model_dir=str(model_dir),
            dtype=config.dtype,
            eos_ids=tuple(sorted(identity.eos_ids)),
            max_sequences=config.max_sequences,
            max_model_tokens=max_model_tokens,
            max_batched_tokens=config.max_batched_tokens,
            kv_cache_bytes=kv_cache_bytes,
            stream_interval=config.stream_interval,
            hang_timeout_s=config.hang_timeout_s,
            lora_rank=None if lora is None else lora.rank,
            keeps_cache=config.kv_cache_at_update == "keep",
            quantization=config.quantization,
            float32_head=config.float32_head,
            enforce_eager=config.enforce_eager,
            engine_arguments=dict(config.engine_arguments),
        )

    async def close(self) -> None:
        await super().close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> Sequence[float]:
        """[T - 1] nats of all tokens but the first under the served weights: a probe."""
        values = await self._worker.call(
            "prompt_logprobs", list(token_ids), timeout_s=_PROBE_TIMEOUT_S
        )
        return values.tolist()

    async def _open(self) -> None:
        limit_s = self._config.start_timeout_s
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="qwen3-distill-vllm-"))
        settings = replace(self._settings, scratch=str(self._scratch))
        await self._worker.call_without_heartbeat("open", settings, timeout_s=limit_s)

    def _explained(self, error: EngineStartError) -> EngineStartError:
        """The error with its cause: vLLM prints it, and passes on only that there was one."""
        text, config, output = str(error), self._config, self._worker.output()
        if "No module named 'vllm'" in output:
            return EngineStartError(
                f"vLLM is not installed for {config.python or sys.executable}: "
                f"{how_to_install('vllm', 'generation')}"
            )
        causes = [line for line in _CAUSE.findall(output) if "initialization failed" not in line]
        if causes and (unknown := _OTHER_VERSION.match(causes[-1])):
            return EngineStartError(
                f"the vLLM of {config.python or sys.executable} is a version that this does not "
                f"work with ({unknown[1]}); use one of docs/engines.md"
            )
        cause = f"; vLLM says: {causes[-1]}" if causes else ""
        if _OUT_OF_MEMORY.search(cause):
            planned = self._settings.kv_cache_bytes / 2**30
            return EngineStartError(
                f"vLLM found too little memory: planned {planned:.1f} GiB of key-value cache for "
                f"{config.max_sequences} sequences beside the student's weights{cause}. Change "
                "generation.kv_cache_gib, generation.max_sequences or generation.max_model_tokens"
            )
        if causes:
            return EngineStartError(text + cause)
        end = self._worker.last_output()
        return EngineStartError(text if end in text else text + end)
