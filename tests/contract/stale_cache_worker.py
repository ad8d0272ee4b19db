"""A rollout process with the mistake that the contract guards against: the cache is kept."""

from qwen3_distill.generation.vllm_worker import VllmWorker
from qwen3_distill.protocols import WeightChannel
from qwen3_distill.types import WeightVersion
from qwen3_distill.utils.worker import serve_worker


class StaleCacheWorker(VllmWorker):
    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        await self._engine.pause_generation(mode="keep", clear_cache=False)
        path = self._adapter_path
        assert not await self._replace(version, channel)
        # vLLM 0.32 tells cached blocks apart by the adapter's path, 0.26 only by its name.
        self._adapter_path = path or self._adapter_path
        self._version = version
        await self._engine.resume_generation()


if __name__ == "__main__":
    serve_worker(StaleCacheWorker())
