"""The worker of an embedded rollout engine: the same engine, served to the controller."""

from collections.abc import AsyncIterator, Sequence

import torch

from qwen3_distill.config import EmbeddedGeneration
from qwen3_distill.errors import EngineError
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.hosts.serve import serve_worker
from qwen3_distill.ports import WeightChannel
from qwen3_distill.types import Rollout, RolloutPrefix, RolloutRequest, WeightVersion


class EmbeddedRolloutWorker:
    """The object that the worker serves. It answers between two decode steps."""

    def __init__(self) -> None:
        self._engine: EmbeddedRolloutEngine | None = None

    def open(self, model_dir: str, config: EmbeddedGeneration) -> None:
        """Load the model."""
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._engine = EmbeddedRolloutEngine(
            model_dir,
            device=config.device,
            dtype=config.dtype,
            max_sequences=config.max_sequences,
            batching=config.batching,
        )

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        await self._open.load(version, channel)

    def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        return self._open.generate(requests)

    async def prefixes(self) -> list[RolloutPrefix]:
        return await self._open.prefixes()

    async def abort(self, rollout_ids: Sequence[str]) -> None:
        await self._open.abort(rollout_ids)

    async def pause(self) -> None:
        await self._open.pause()

    async def resume(self) -> None:
        await self._open.resume()

    @property
    def _open(self) -> EmbeddedRolloutEngine:
        if self._engine is None:
            raise EngineError("the rollout engine is not open: start it first")
        return self._engine


if __name__ == "__main__":
    serve_worker(EmbeddedRolloutWorker())
