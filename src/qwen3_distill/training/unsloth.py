"""The unsloth learner, seen from the controller: its process, what it is asked, what it answers."""

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_distill.config import LoraTuning, ObjectiveConfig, ReplayConfig, UnslothTraining
from qwen3_distill.errors import EngineError, EngineLost, EngineStartError, LearnerLost
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.protocols import WeightChannel
from qwen3_distill.types import Batch, ModelIdentity, ScoredRollout, Update, WeightVersion
from qwen3_distill.utils.worker import WorkerProcess

_WORKER = "qwen3_distill.training.unsloth_worker"


class UnslothLearner:
    """A `Learner` whose steps are taken by unsloth in a process of its own.

    Args:
        model_dir: the student.
        publish_adapter: publish LoRA adapters by themselves, not merged into all weights.
        memory_bytes: what the process may take of the device, for
            ``gradient_checkpointing=auto``; None: the config's, else what is free at the start.
        log: file that takes the process's output; appended to.
        replay: the buffer in that process, out of the same memory.
    """

    def __init__(
        self,
        model_dir: str | Path,
        config: UnslothTraining,
        *,
        objective: ObjectiveConfig,
        total_steps: int,
        seed: int,
        publish_adapter: bool,
        memory_bytes: int | None,
        log: Path,
        replay: ReplayConfig | None = None,
    ) -> None:
        self._model_dir = Path(model_dir).resolve()
        self._config = config
        self._objective = objective
        self._settings = {
            "total_steps": total_steps,
            "seed": seed,
            "publish_adapter": publish_adapter,
            "memory_bytes": memory_bytes,
            "replay": replay,
        }
        self._log = log
        self._identity = load_identity(model_dir)
        self._scratch: Path | None = None
        self._worker: WorkerProcess | None = None
        self._version: WeightVersion | None = None
        self._description: Mapping[str, str] = {}

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @property
    def version(self) -> WeightVersion:
        if self._version is None:
            raise EngineError("the unsloth learner has no weights yet: start it first")
        return self._version

    @property
    def worker(self) -> WorkerProcess | None:
        """The process, while there is one."""
        return self._worker

    def describe(self) -> Mapping[str, str]:
        """How the model runs (kernels, layers recomputed, packing), for people; after `start`."""
        return self._description

    async def start(self) -> None:
        """Start the process and load the student: step 0, whatever was trained before.

        Raises:
            EngineStartError: not installed, wrong version, no memory, no answer in time.
        """
        await self.close()
        try:
            await self._launch()
            opened = await self._call(
                "open",
                str(self._model_dir),
                self._config,
                self._objective,
                self._settings,
                timeout_s=self._config.start_timeout_s,
            )
        except BaseException as error:
            await self.close()
            if isinstance(error, EngineError) and not isinstance(error, EngineStartError):
                raise EngineStartError(str(error)) from error
            raise
        self._version, self._description = opened

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
        scratch, self._scratch = self._scratch, None
        if scratch is not None:
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)

    async def _launch(self) -> None:
        """Start the process."""
        self._scratch = Path(tempfile.mkdtemp(prefix="qwen3-distill-unsloth-"))
        self._worker = WorkerProcess(
            "unsloth learner",
            python=self._config.python or sys.executable,
            module=_WORKER,
            log=self._log,
            environment=self.environment(self._scratch),
        )
        await self._worker.start()

    async def _call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        if self._worker is None:
            raise EngineError("the unsloth learner is not running: start it first")
        try:
            return await self._worker.call(method, *arguments, timeout_s=timeout_s)
        except EngineLost as error:
            raise LearnerLost(str(error)) from None

    def environment(self, scratch: Path) -> dict[str, str]:
        """Variables of the process; the config's come last."""
        variables = {
            # Generated code; by default a folder in the working directory.
            "UNSLOTH_COMPILE_LOCATION": str(scratch / "compiled"),
            "UNSLOTH_DISABLE_STATISTICS": "1",
            "HF_HUB_OFFLINE": "1",  # the student is a directory
        }
        if not self._publishes_adapters:
            # unsloth turns expandable segments on, and their memory cannot be lent by CUDA IPC
            # without a privilege that containers rarely have. Torch 2.9 reads the second name.
            off = "expandable_segments:False"
            variables |= {"PYTORCH_ALLOC_CONF": off, "PYTORCH_CUDA_ALLOC_CONF": off}
        return variables | self._config.environment

    @property
    def _publishes_adapters(self) -> bool:
        lora = isinstance(self._config.tuning, LoraTuning)
        return lora and bool(self._settings["publish_adapter"])
