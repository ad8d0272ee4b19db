"""The embedded teacher in a process of its own, seen from the controller.

When the process dies or hangs it is started again and scores anew what it owes: a score depends on
nothing but the job.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen3_distill.config import EmbeddedScoring
from qwen3_distill.errors import EngineError, EngineLost
from qwen3_distill.hosts.process import WorkerProcess
from qwen3_distill.hosts.supervision import Restarts
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.scoring.score_request import ScoreRequest
from qwen3_distill.types import ModelIdentity, ScoreResult, ScoringJob

_MODULE = "qwen3_distill.scoring.embedded.worker"


class EmbeddedTeacherProcess:
    """A `TeacherScorer`: an `EmbeddedTeacher` elsewhere.

    Args:
        request: what the objective needs; hidden states are of no use without the output head.
        log: file that takes the process's output.
    """

    def __init__(self, config: EmbeddedScoring, *, request: ScoreRequest, log: Path) -> None:
        model_dir = Path(config.model).resolve()
        self._identity = load_identity(model_dir)
        self._config = config.model_copy(update={"model": str(model_dir)})
        self._request = request
        self._teacher_id: str | None = None
        self._worker = WorkerProcess(
            "embedded teacher",
            python=sys.executable,
            module=_MODULE,
            log=log,
            hang_timeout_s=config.hang_timeout_s,
            start_timeout_s=config.start_timeout_s,
        )
        self._restarts = Restarts(
            start=self._start,
            end=self._worker.close,
            restore=_nothing,
            limit=config.max_restarts,
        )

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @property
    def teacher_id(self) -> str:
        """Read from the weights in use, so there is none before `start`."""
        if self._teacher_id is None:
            raise EngineError("the teacher's weights are not loaded yet: start it first")
        return self._teacher_id

    @property
    def counters(self) -> Mapping[str, float]:
        return {"score/server_restarts": self._restarts.count}

    @property
    def worker(self) -> WorkerProcess:
        return self._worker

    async def start(self) -> None:
        """Start the process and load the teacher in it.

        Raises:
            EngineStartError: it does not start.
        """
        await self._restarts.start()

    @property
    def max_dropped_fraction(self) -> float:
        return 0.0

    @property
    def starts_first(self) -> bool:
        return False

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        while True:
            start = await self._restarts.current()
            try:
                return await self._worker.call("score", list(jobs))
            except EngineLost as error:
                await self._restarts.recover(start, error)

    async def close(self) -> None:
        await self._restarts.close()

    async def _start(self) -> None:
        await self._worker.start()
        self._teacher_id = await self._worker.call_without_heartbeat(
            "open", self._config, self._request, timeout_s=self._config.start_timeout_s
        )


async def _nothing() -> None:
    """A teacher has no state to be given back."""
