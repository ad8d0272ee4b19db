"""The worker's side of a hosted learner: the methods that it serves to `HostedLearner`.

No torch and no transformers here: a worker of unsloth imports this before unsloth.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3_distill.errors import EngineError
from qwen3_distill.ports import WeightChannel, WeightPayload
from qwen3_distill.training.rank_place import RankPlace, StepShare
from qwen3_distill.types import Batch, ScoredRollout, Update, WeightVersion

if TYPE_CHECKING:
    from qwen3_distill.training.learner import TorchLearner


class LearnerService:
    """A learner's methods; a subclass opens the learner.

    A step blocks the worker, so a call that comes during a step is answered after it.
    """

    def __init__(self) -> None:
        self.learner: TorchLearner | None = None
        self.place: RankPlace | None = None
        """This learner's rank in a group; None: it steps alone."""
        self._channel: WeightChannel | None = None
        """The channel last published to: it may hold tensors that engines are reading."""

    def _serve(self, learner: "TorchLearner") -> "tuple[WeightVersion, dict[str, str]]":
        """Serve an open learner from now on; return its version and a description."""
        if self.place is not None and not self.place.sharded:
            from qwen3_distill.training.ranks import Ranks  # noqa: PLC0415 - imports torch

            learner.join(Ranks(self.place, learner.student.device))
        self.learner = learner
        return learner.version, learner.student.describe()

    def take_place(self, place: RankPlace) -> None:
        """Note this learner's rank; it meets the others when it is opened."""
        self.place = place

    def gather(self) -> None:
        """Take part in the gathering of the whole weights that the first rank looks at."""
        self._open.gather()

    async def update_share(self, share: StepShare) -> Update:
        return await self._open.update_share(share)

    async def update(self, batch: Batch) -> Update:
        return await self._open.update(batch)

    async def admit(self, scored: Sequence[ScoredRollout]) -> None:
        await self._open.admit(scored)

    async def update_replayed(self, num_rollouts: int) -> Update:
        return await self._open.update_replayed(num_rollouts)

    async def publish(self, channel: WeightChannel) -> WeightVersion:
        """Publish from this process; the channel reaches beyond it."""
        version = await self._open.publish(channel)
        self._channel = channel
        return version

    def payload(self) -> WeightPayload:
        """The current weights in host memory, for the controller to publish."""
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
