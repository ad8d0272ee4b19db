"""vLLM as a `RolloutEngine`: the controller's side of the rollout process.

vLLM is not imported here. The process may have an interpreter and an environment of its own; when
it dies it is started again, gets the version that it served, and samples anew what it had not
finished: every request has its own seed, and no rollout is given twice.
"""

import asyncio
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from qwen3_distill.config import LoraTuning, VllmGeneration
from qwen3_distill.errors import DataError, EngineLost, EngineStartError, WeightVersionError
from qwen3_distill.generation.vllm_settings import VllmInfo, VllmSettings
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.protocols import WeightChannel
from qwen3_distill.types import Rollout, RolloutPrefix, RolloutRequest, WeightVersion
from qwen3_distill.utils.worker import WorkerProcess
from qwen3_distill.weights.directory import DirectoryChannel

_LOAD_TIMEOUT_S = 300.0
_CALL_TIMEOUT_S = 60.0
_CAUSE = re.compile(r"\b(\w+(?:Error|Exception): .*)")
_OUT_OF_MEMORY = re.compile(
    r"out of memory|memory on device|available memory|KV cache is needed|max seq len", re.I
)
_MODULE = "qwen3_distill.generation.vllm_worker"


class VllmRolloutEngine:
    """A `RolloutEngine` whose rollouts go on while weights are swapped.

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
        self._identity = load_identity(model_dir)
        self._config = config
        limit = config.max_model_tokens or self._identity.context_length
        self._max_model_tokens = min(limit, self._identity.context_length)
        self._settings = VllmSettings(
            model_dir=str(model_dir),
            dtype=config.dtype,
            eos_ids=tuple(sorted(self._identity.eos_ids)),
            max_sequences=config.max_sequences,
            max_model_tokens=self._max_model_tokens,
            max_batched_tokens=config.max_batched_tokens,
            kv_cache_bytes=kv_cache_bytes,
            stream_interval=config.stream_interval,
            lora_rank=None if lora is None else lora.rank,
            quantization=config.quantization,
            float32_head=config.float32_head,
            enforce_eager=config.enforce_eager,
            engine_arguments=dict(config.engine_arguments),
        )
        self._worker = WorkerProcess(
            "vLLM",
            python=config.python or sys.executable,
            module=_MODULE,
            log=log,
            environment=config.environment,
        )
        self._info: VllmInfo | None = None
        self._served: tuple[WeightVersion, WeightChannel] | None = None
        self._recovering = asyncio.Lock()
        self._starts = 0
        self._own_channel: _PrivateChannel | None = None

    @property
    def counters(self) -> Mapping[str, float]:
        """Cumulative figures by metric key."""
        return {"health/rollout_engine_restarts": max(0, self._starts - 1)}

    @property
    def pid(self) -> int | None:
        """Leader of the process group of vLLM's processes."""
        return self._worker.pid

    @property
    def version(self) -> WeightVersion:
        if self._served is None:
            raise WeightVersionError(
                "the rollout engine has no weights yet: load a published version before the "
                "first rollout"
            )
        return self._served[0]

    async def start(self) -> None:
        """Start the process and the engine in it.

        Raises:
            EngineStartError: not installed, or the engine does not start.
        """
        self._starts += 1
        try:
            await self._worker.start()
            self._info = await self._worker.call(
                "open", self._settings, timeout_s=self._config.start_timeout_s
            )
        except EngineStartError as error:
            explained = self._explained(error)
            await self._worker.close()
            raise explained from None
        except BaseException:
            await self._worker.close()
            raise

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        self._served = None
        if not channel.crosses_processes:
            payload = channel.fetch(version)
            self._own_channel = self._own_channel or _PrivateChannel()
            channel = self._own_channel.channel
            channel.publish(version, payload)
        start = self._starts
        try:
            await self._load(version, channel)
        except EngineLost as error:
            await self._recover(start, error, serve=(version, channel))

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        _ = self.version  # nothing is sampled without weights
        self._check_context(requests)
        missing = {request.rollout_id: request for request in requests}
        while missing:
            start = self._starts
            try:
                async for rollout in self._worker.stream("generate", list(missing.values())):
                    del missing[rollout.rollout_id]
                    yield rollout
                return  # what is missing now was aborted
            except EngineLost as error:
                await self._recover(start, error, serve=self._served)

    async def prefixes(self) -> list[RolloutPrefix]:
        """What exists of the running rollouts, to the last `stream_interval` tokens."""
        return await self._worker.call("prefixes", timeout_s=_CALL_TIMEOUT_S)

    async def abort(self, rollout_ids: Sequence[str]) -> None:
        """End running rollouts: `generate` does not yield them."""
        await self._worker.call("abort", list(rollout_ids), timeout_s=_CALL_TIMEOUT_S)

    async def pause(self) -> None:
        """Stop decoding until `resume`; rollouts keep what they have."""
        await self._worker.call("pause", timeout_s=_CALL_TIMEOUT_S)

    async def resume(self) -> None:
        await self._worker.call("resume", timeout_s=_CALL_TIMEOUT_S)

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> Sequence[float]:
        """[T - 1] nats of all tokens but the first under the served weights: a probe."""
        values = await self._worker.call(
            "prompt_logprobs", list(token_ids), timeout_s=_CALL_TIMEOUT_S
        )
        return values.tolist()

    async def close(self) -> None:
        self._served = None
        await self._worker.close()
        if self._own_channel is not None:
            self._own_channel.remove()
            self._own_channel = None

    def kill(self) -> None:
        """SIGKILL vLLM's processes, for tests of the recovery."""
        self._worker.kill()

    async def _load(self, version: WeightVersion, channel: WeightChannel) -> None:
        await self._worker.call("load", version, channel, timeout_s=_LOAD_TIMEOUT_S)
        self._served = (version, channel)

    async def _recover(
        self, start: int, error: EngineLost, serve: tuple[WeightVersion, WeightChannel] | None
    ) -> None:
        """Bring the engine back after its death, once for all who noticed it.

        Args:
            start: number of the start that the caller saw die.
            serve: what the new process is given.

        Raises:
            EngineLost: it has died more often than the config allows.
        """
        async with self._recovering:
            if self._starts > start:
                return  # somebody else did
            if self._starts > self._config.max_restarts:
                raise error
            await self._worker.close()
            await self.start()
            if serve is not None:
                await self._load(*serve)

    def _explained(self, error: EngineStartError) -> EngineStartError:
        """The error with its cause: vLLM prints it, and passes on only that there was one."""
        text, config, output = str(error), self._config, self._worker.output()
        if "No module named 'vllm'" in output:
            return EngineStartError(
                f"vLLM is not installed for {config.python or sys.executable}: make an "
                "environment with `pip install 'qwen3-distill[vllm]'` and set generation.python "
                "to its interpreter (docs/engines.md)"
            )
        causes = [line for line in _CAUSE.findall(output) if "initialization failed" not in line]
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
        return EngineStartError(text if "the end of" in text else text + self._worker.last_output())

    def _check_context(self, requests: Sequence[RolloutRequest]) -> None:
        for request in requests:
            prompt_tokens = request.prompt.token_ids.size
            if prompt_tokens + request.sampling.max_new_tokens > self._max_model_tokens:
                raise DataError(
                    f"rollout {request.rollout_id}: {prompt_tokens} prompt tokens + max_new_tokens "
                    f"{request.sampling.max_new_tokens} exceed the model's context of "
                    f"{self._max_model_tokens}"
                )


class _PrivateChannel:
    """Files for versions that come through a channel which does not cross processes."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="qwen3-distill-weights-"))
        self.channel = DirectoryChannel(self._directory)

    def remove(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
