"""A learner in a host, as the controller sees it; the same code for every engine.

A lost learner's weights are lost with it, so nothing is recovered here: the caller starts it again
and loads a checkpoint.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_distill.errors import EngineError, EngineLost, EngineStartError, LearnerLost
from qwen3_distill.hosts.host import Host
from qwen3_distill.hosts.opening import Opening
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.ports import WeightChannel, reaches
from qwen3_distill.training.rank_place import RankPlace, StepShare
from qwen3_distill.types import Batch, ModelIdentity, ScoredRollout, Update, WeightVersion


class HostedLearner:
    """A `ReplayingLearner` whose worker serves a `LearnerService`.

    Args:
        host: runs the worker.
        opening: opens the learner in it; its result is the first version, and a description.
        model_dir: the student.
        max_restarts: how often per run the worker may be started again.
    """

    def __init__(
        self, host: Host, opening: Opening, model_dir: str | Path, *, max_restarts: int
    ) -> None:
        self._host = host
        self._opening = opening
        self._identity = load_identity(model_dir)
        self._max_restarts = max_restarts
        self._version: WeightVersion | None = None
        self._description: Mapping[str, str] = {}
        self.place: RankPlace | None = None
        """The rank that the next start takes in a group; None: the learner steps alone."""

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @property
    def version(self) -> WeightVersion:
        if self._version is None:
            raise EngineError(f"the {self._host.name} has no weights yet: start it first")
        return self._version

    @property
    def max_restarts(self) -> int:
        return self._max_restarts

    @property
    def host(self) -> Host:
        return self._host

    def describe(self) -> Mapping[str, str]:
        """How the model runs (device, memory, kernels, packing), for people; after `start`."""
        return self._description

    async def start(self) -> None:
        """Start the worker and load the student as of step 0.

        Raises:
            EngineStartError: not installed, wrong version, no memory, no answer in time.
        """
        await self.close()
        try:
            await self._host.start(self._opening.environment())
            if self.place is not None:
                await self._host.call("take_place", self.place)
            self._version, self._description = await self._opening.open(self._host)
        except BaseException as error:
            await self.close()
            if isinstance(error, EngineStartError):
                raise self._opening.explained(error, self._host) from None
            if isinstance(error, EngineError):
                raise EngineStartError(str(error)) from error
            raise

    async def update(self, batch: Batch) -> Update:
        update: Update = await self._call("update", batch)
        self._version = update.version
        return update

    async def update_share(self, share: StepShare) -> Update:
        """Take an optimizer step together with all ranks of the group."""
        update: Update = await self._call("update_share", share)
        self._version = update.version
        return update

    async def admit(self, scored: Sequence[ScoredRollout]) -> None:
        await self._call("admit", tuple(scored))

    async def update_replayed(self, num_rollouts: int) -> Update:
        update: Update = await self._call("update_replayed", num_rollouts)
        self._version = update.version
        return update

    async def publish(self, channel: WeightChannel) -> WeightVersion:
        if reaches(channel, "machine"):
            return await self._call("publish", channel)
        version, payload = self.version, await self._call("payload")
        channel.publish(version, payload)
        return version

    async def gather(self) -> None:
        """Take part in what the first rank of a group that divides its weights publishes."""
        await self._call("gather")

    async def save_state(self, directory: Path) -> None:
        await self._call("save_state", directory.resolve())

    async def load_state(self, directory: Path, version: WeightVersion) -> None:
        await self._call("load_state", directory.resolve(), version)
        self._version = version

    async def save_student(self, directory: Path) -> None:
        await self._call("save_student", directory.resolve())

    async def close(self) -> None:
        self._version = None
        await self._host.close()

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self._version is None:
            raise EngineError(f"the {self._host.name} is not running: start it first")
        try:
            return await self._host.call(method, *arguments)
        except EngineLost as error:
            raise LearnerLost(str(error)) from None
