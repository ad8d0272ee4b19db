"""The unsloth learner, seen from the controller: its process, what it is asked, what it answers."""

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qwen3_distill.config import LoraTuning, ObjectiveConfig, ReplayConfig, UnslothTraining
from qwen3_distill.hosts.process import WorkerProcess
from qwen3_distill.training.hosted import HostedLearner
from qwen3_distill.types import WeightVersion

_WORKER = "qwen3_distill.training.unsloth.worker"


class UnslothLearner(HostedLearner):
    """A `ReplayingLearner` whose steps are taken by unsloth in a process of its own.

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
        super().__init__("unsloth learner", model_dir)
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
        self._scratch: Path | None = None
        self._description: Mapping[str, str] = {}

    def describe(self) -> Mapping[str, str]:
        """How the model runs (kernels, layers recomputed, packing), for people; after `start`."""
        return self._description

    async def close(self) -> None:
        await super().close()
        scratch, self._scratch = self._scratch, None
        if scratch is not None:
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)

    def _make_worker(self) -> WorkerProcess:
        self._scratch = Path(tempfile.mkdtemp(prefix="qwen3-distill-unsloth-"))
        return WorkerProcess(
            "unsloth learner",
            python=self._config.python or sys.executable,
            module=_WORKER,
            log=self._log,
            environment=self.environment(self._scratch),
            hang_timeout_s=self._config.hang_timeout_s,
            start_timeout_s=self._config.start_timeout_s,
        )

    async def _open(self, worker: WorkerProcess) -> WeightVersion:
        version, self._description = await worker.call_without_heartbeat(
            "open",
            str(self._model_dir),
            self._config,
            self._objective,
            self._settings,
            timeout_s=self._config.start_timeout_s,
        )
        return version

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
