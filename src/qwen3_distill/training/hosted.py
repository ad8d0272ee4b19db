"""A learner in a process of its own: what the controller does, whichever engine trains.

A learner that is lost took its weights with it, so nothing is recovered here: it is started again
and goes on from a checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3_distill.errors import EngineError, EngineLost, EngineStartError, LearnerLost
from qwen3_distill.hosts.process import WorkerProcess
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.ports import WeightChannel
from qwen3_distill.types import Batch, ModelIdentity, ScoredRollout, Update, WeightVersion


class HostedLearner:
    """A `ReplayingLearner` over a worker that serves a `LearnerService`.

    Subclasses make the worker (`_make_worker`) and open the learner in it (`_open`).

    Args:
        name: names the learner in errors.
        model_dir: the student.
    """

    def __init__(self, name: str, model_dir: str | Path) -> None:
        self._name = name
        self._identity = load_identity(model_dir)
        self._worker: WorkerProcess | None = None
        self._version: WeightVersion | None = None

    def _make_worker(self) -> WorkerProcess:
        raise NotImplementedError

    async def _open(self, worker: WorkerProcess) -> WeightVersion:
        """Load the student in the worker, which runs; the version that it begins with."""
        raise NotImplementedError

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @property
    def version(self) -> WeightVersion:
        if self._version is None:
            raise EngineError(f"the {self._name} has no weights yet: start it first")
        return self._version

    @property
    def worker(self) -> WorkerProcess | None:
        """The process, while there is one."""
        return self._worker

    async def start(self) -> None:
        """Start the process and load the student: step 0, whatever was trained before.

        Raises:
            EngineStartError: not installed, wrong version, no memory, no answer in time.
        """
        await self.close()
        try:
            self._worker = self._make_worker()
            await self._worker.start()
            self._version = await self._open(self._worker)
        except BaseException as error:
            await self.close()
            if isinstance(error, EngineError) and not isinstance(error, EngineStartError):
                raise EngineStartError(str(error)) from error
            raise

    async def update(self, batch: Batch) -> Update:
        update: Update = await self._call("update", batch)
        self._version = update.version
        return update

    async def admit(self, scored: Sequence[ScoredRollout]) -> None:
        await self._call("admit", tuple(scored))

    async def update_replayed(self, num_rollouts: int) -> Update:
        update: Update = await self._call("update_replayed", num_rollouts)
        self._version = update.version
        return update

    async def publish(self, channel: WeightChannel) -> WeightVersion:
        if channel.crosses_processes:
            return await self._call("publish", channel)
        version, payload = self.version, await self._call("payload")
        channel.publish(version, payload)
        return version

    async def save_state(self, directory: Path) -> None:
        await self._call("save_state", directory.resolve())

    async def load_state(self, directory: Path, version: WeightVersion) -> None:
        await self._call("load_state", directory.resolve(), version)
        self._version = version

    async def save_student(self, directory: Path) -> None:
        await self._call("save_student", directory.resolve())

    async def close(self) -> None:
        self._version = None
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.close()

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self._worker is None:
            raise EngineError(f"the {self._name} is not running: start it first")
        try:
            return await self._worker.call(method, *arguments)
        except EngineLost as error:
            raise LearnerLost(str(error)) from None
