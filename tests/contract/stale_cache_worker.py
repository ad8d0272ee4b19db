"""A rollout process with the mistake that the contract guards against: the cache is kept, and new
rollouts find in it what older weights computed."""
# pyright: reportMissingImports=false

from typing import Any

from qwen3_distill.generation.vllm.worker import VllmWorker, compat
from qwen3_distill.hosts.serve import serve_worker
from qwen3_distill.ports import WeightChannel
from qwen3_distill.types import WeightVersion


class StaleCacheWorker(VllmWorker):
    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        await self._engine.pause_generation(mode="keep", clear_cache=False)
        path = self._adapter_path
        assert not await self._replace(version, channel)
        # vLLM 0.32 tells cached blocks apart by the adapter's path, 0.26 only by its name.
        self._adapter_path = path or self._adapter_path
        self._version = version
        await self._engine.resume_generation()


def unsalted(token_ids: list[int], load: int) -> Any:
    from vllm import TokensPrompt  # noqa: PLC0415 - after the worker has set its variables

    return TokensPrompt(prompt_token_ids=token_ids)


if __name__ == "__main__":
    compat.prompt = unsalted
    serve_worker(StaleCacheWorker())
