"""vLLM as a `StreamingRolloutEngine`: the controller's side of the rollout worker.

vLLM is not imported here: the worker may have an interpreter and an environment of its own.
"""

import re
from pathlib import Path

from qwen3_distill.config import LoraTuning, VllmGeneration
from qwen3_distill.environments.installed import engine_python
from qwen3_distill.errors import EngineStartError
from qwen3_distill.generation.hosted import HostedRolloutEngine
from qwen3_distill.generation.vllm.settings import VllmSettings
from qwen3_distill.hosts.child import how_to_install
from qwen3_distill.hosts.host import Host, MakeHost, WorkerSpec
from qwen3_distill.hosts.opening import Opening
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.modeling.loading import load_identity

_CAUSE = re.compile(r"\b(\w+(?:Error|Exception): .*)")
_OTHER_VERSION = re.compile(r"(?:Import|ModuleNotFound)Error: (.*\bvllm\..*|.*from 'vllm'.*)")
_OUT_OF_MEMORY = re.compile(
    r"out of memory|memory on device|available memory|KV cache is needed|max seq len", re.I
)
# Python prints these and goes on, most of them while a process that has failed is ending.
_IGNORED = re.compile(r"Exception ignored (?:in|while)\b.*\n(?:(?:.*Traceback \(most.*|\s.*)\n)*.*")
_MODULE = "qwen3_distill.generation.vllm.worker"


def vllm_engine(
    model_dir: str | Path,
    config: VllmGeneration,
    *,
    lora: LoraTuning | None,
    kv_cache_bytes: int,
    log: Path,
    num_candidates: int = 0,
    make_host: MakeHost = LocalProcess,
) -> HostedRolloutEngine:
    """Make a `StreamingRolloutEngine` of vLLM.

    Args:
        model_dir: the student; the weights that adapters are added to.
        lora: serve adapters up to this tuning's rank; None: whole weights are loaded.
        kv_cache_bytes: size of the key-value cache.
        log: file that takes the worker's output.
        num_candidates: most likely tokens that a request may ask for.
        make_host: where the worker runs.

    Raises:
        ConfigError: no interpreter is named and no environment of vLLM is installed.
    """
    python = engine_python("vllm", "generation", config.python)
    settings = _settings(
        model_dir,
        config,
        lora_rank=None if lora is None else lora.rank,
        kv_cache_bytes=kv_cache_bytes,
        num_candidates=num_candidates,
    )
    host = make_host(
        WorkerSpec(
            name="vLLM",
            python=python,
            module=_MODULE,
            log=log,
            environment=config.environment,
            hang_timeout_s=config.hang_timeout_s,
            start_timeout_s=config.start_timeout_s,
        )
    )
    return HostedRolloutEngine(
        host,
        VllmOpening(config, settings, python),
        max_model_tokens=settings.max_model_tokens,
        max_restarts=config.max_restarts,
    )


def _settings(
    model_dir: str | Path,
    config: VllmGeneration,
    *,
    lora_rank: int | None,
    kv_cache_bytes: int,
    num_candidates: int,
) -> VllmSettings:
    identity = load_identity(model_dir)
    limit = config.max_model_tokens or identity.context_length
    return VllmSettings(
        model_dir=str(model_dir),
        dtype=config.dtype,
        eos_ids=tuple(sorted(identity.eos_ids)),
        max_sequences=config.max_sequences,
        tensor_parallel=config.tensor_parallel,
        max_model_tokens=min(limit, identity.context_length),
        max_batched_tokens=config.max_batched_tokens,
        kv_cache_bytes=kv_cache_bytes,
        kv_cache_dtype=config.kv_cache_dtype,
        attention_backend=config.attention_backend,
        stream_interval=config.stream_interval,
        hang_timeout_s=config.hang_timeout_s,
        lora_rank=lora_rank,
        keeps_cache=config.kv_cache_at_update == "keep",
        quantization=config.quantization,
        float32_head=config.float32_head,
        enforce_eager=config.enforce_eager,
        num_candidates=num_candidates,
        engine_arguments=dict(config.engine_arguments),
    )


class VllmOpening(Opening):
    """Opens vLLM in its worker, and finds the cause of a failed start in its output."""

    def __init__(self, config: VllmGeneration, settings: VllmSettings, python: str) -> None:
        super().__init__(timeout_s=config.start_timeout_s)
        self._config = config
        self._settings = settings
        self._python = python

    async def open(self, host: Host) -> None:
        await host.call_without_heartbeat("open", self._settings, timeout_s=self._timeout_s)

    def explained(self, error: EngineStartError, host: Host) -> EngineStartError:
        """Return the error with its cause: vLLM prints it and passes on only that there was one."""
        text, config, output = str(error), self._config, host.output()
        if "No module named 'vllm'" in output:
            return EngineStartError(
                f"vLLM is not installed for {self._python}: {how_to_install('vllm', 'generation')}"
            )
        causes = _causes(output)
        if causes and (unknown := _OTHER_VERSION.match(causes[-1])):
            return EngineStartError(
                f"the vLLM of {self._python} is a version that this does not "
                f"work with ({unknown[1]}); use one of docs/engines/install.md"
            )
        memory = [line for line in causes if _OUT_OF_MEMORY.search(line)]
        cause = f"; vLLM says: {(memory or causes)[-1]}" if causes else ""
        if memory:
            planned = self._settings.kv_cache_bytes / 2**30
            return EngineStartError(
                f"vLLM found too little memory: planned {planned:.1f} GiB of key-value cache for "
                f"{config.max_sequences} sequences beside the student's weights{cause}. Change "
                "generation.kv_cache_gib, generation.max_sequences or generation.max_model_tokens"
            )
        if causes:
            return EngineStartError(text + cause)
        end = host.last_output()
        return EngineStartError(text if end in text else text + end)


def _causes(output: str) -> list[str]:
    """Return the exceptions that vLLM printed, without those that say only that there was one."""
    lines = _CAUSE.findall(_IGNORED.sub("", output))
    return [line for line in lines if "initialization failed" not in line]
