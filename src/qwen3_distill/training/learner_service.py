"""The learner in its own process: what it serves to the controller's `HostedLearner`.

No torch and no transformers here: a worker of unsloth imports this before unsloth.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3_distill.errors import EngineError
from qwen3_distill.ports import WeightChannel, WeightPayload
from qwen3_distill.types import Batch, ScoredRollout, Update, WeightVersion

if TYPE_CHECKING:
    from qwen3_distill.training.learner import TorchLearner


class LearnerService:
    """A learner's methods, once a subclass has opened it. A step keeps the worker from answering.

    All are one after another by that: whoever asks during a step is answered after it.
    """

    def __init__(self) -> None:
        self.learner: TorchLearner | None = None

    async def update(self, batch: Batch) -> Update:
        return await self._open.update(batch)

    async def admit(self, scored: Sequence[ScoredRollout]) -> None:
        await self._open.admit(scored)

    async def update_replayed(self, num_rollouts: int) -> Update:
        return await self._open.update_replayed(num_rollouts)

    async def publish(self, channel: WeightChannel) -> WeightVersion:
        """Publish from here: the channel crosses processes."""
        return await self._open.publish(channel)

    def payload(self) -> WeightPayload:
        """The current weights on the host, to be published over there."""
        payload = self._open.payload()
        tensors = {name: tensor.detach().cpu() for name, tensor in payload.tensors.items()}
        return replace(payload, tensors=tensors)

    async def save_state(self, directory: Path) -> None:
        await self._open.save_state(directory)

    async def load_state(self, directory: Path, version: WeightVersion) -> None:
        await self._open.load_state(directory, version)

    async def save_student(self, directory: Path) -> None:
        await self._open.save_student(directory)

    @property
    def _open(self) -> "TorchLearner":
        if self.learner is None:
            raise EngineError("the learner is not open: start it first")
        return self.learner
