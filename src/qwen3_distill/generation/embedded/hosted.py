"""The embedded rollout engine in a process of its own, seen from the controller."""

import sys
from pathlib import Path

from qwen3_distill.config import EmbeddedGeneration
from qwen3_distill.generation.hosted import HostedRolloutEngine
from qwen3_distill.hosts.process import WorkerProcess
from qwen3_distill.modeling.loading import load_identity

_MODULE = "qwen3_distill.generation.embedded.worker"


class EmbeddedRolloutProcess(HostedRolloutEngine):
    """A `StreamingRolloutEngine`: an `EmbeddedRolloutEngine` elsewhere.

    Args:
        model_dir: the student.
        log: file that takes the process's output.
    """

    def __init__(self, model_dir: str | Path, config: EmbeddedGeneration, *, log: Path) -> None:
        worker = WorkerProcess(
            "embedded rollout engine",
            python=sys.executable,
            module=_MODULE,
            log=log,
            hang_timeout_s=config.hang_timeout_s,
            start_timeout_s=config.start_timeout_s,
        )
        context_length = load_identity(model_dir).context_length
        super().__init__(worker, max_model_tokens=context_length, max_restarts=config.max_restarts)
        self._model_dir = Path(model_dir).resolve()
        self._config = config

    async def _open(self) -> None:
        await self._worker.call_without_heartbeat(
            "open", str(self._model_dir), self._config, timeout_s=self._config.start_timeout_s
        )
