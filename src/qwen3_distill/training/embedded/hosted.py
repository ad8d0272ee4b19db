"""The embedded learner in a process of its own, seen from the controller."""

import sys
from pathlib import Path

from qwen3_distill.config import EmbeddedTraining, ObjectiveConfig, ReplayConfig
from qwen3_distill.hosts.process import WorkerProcess
from qwen3_distill.training.hosted import HostedLearner
from qwen3_distill.types import WeightVersion

_MODULE = "qwen3_distill.training.embedded.worker"


class EmbeddedLearnerProcess(HostedLearner):
    """A `ReplayingLearner`: an `EmbeddedLearner` elsewhere.

    Args:
        model_dir: the student.
        objective: one that needs no hidden states of the teacher.
        publish_adapter: publish LoRA adapters by themselves, not merged into all weights.
        log: file that takes the process's output; appended to.
    """

    def __init__(
        self,
        model_dir: str | Path,
        config: EmbeddedTraining,
        *,
        objective: ObjectiveConfig,
        replay: ReplayConfig | None,
        total_steps: int,
        seed: int,
        publish_adapter: bool,
        log: Path,
    ) -> None:
        super().__init__("embedded learner", model_dir)
        self._model_dir = Path(model_dir).resolve()
        self._config = config
        self._objective = objective
        self._replay = replay
        self._settings = {
            "total_steps": total_steps,
            "seed": seed,
            "publish_adapter": publish_adapter,
        }
        self._log = log

    def _make_worker(self) -> WorkerProcess:
        return WorkerProcess(
            "embedded learner",
            python=sys.executable,
            module=_MODULE,
            log=self._log,
            hang_timeout_s=self._config.hang_timeout_s,
            start_timeout_s=self._config.start_timeout_s,
        )

    async def _open(self, worker: WorkerProcess) -> WeightVersion:
        return await worker.call_without_heartbeat(
            "open",
            str(self._model_dir),
            self._config,
            self._objective,
            self._replay,
            self._settings,
            timeout_s=self._config.start_timeout_s,
        )
