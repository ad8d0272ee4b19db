"""The worker of a served teacher on another node: it starts the server there, on loopback.

So nothing of the server listens to the network, and the client's checks run next to it.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_distill.errors import EngineError
from qwen3_distill.scoring.served.teacher import ServedTeacher
from qwen3_distill.types import Rollout, RolloutRequest, ScoreResult, ScoringJob


class ServedTeacherWorker:
    """The object that such a worker serves.

    Args:
        make: makes the teacher of what `open` is given, and a log.
    """

    def __init__(self, make: Callable[..., ServedTeacher]) -> None:
        self._make = make
        self._teacher: ServedTeacher | None = None

    async def open(self, *arguments: Any) -> str:
        """Start the server; return the teacher's id. It writes into this process's own log.

        Args:
            arguments: what the teacher is made of, but for the log.
        """
        self._teacher = self._make(*arguments, Path("/proc/self/fd/1").resolve())
        await self._teacher.start()
        return self._teacher.teacher_id

    async def score(
        self, jobs: Sequence[ScoringJob]
    ) -> tuple[list[ScoreResult], Mapping[str, float]]:
        """Score jobs; return the results and the teacher's counters."""
        results = await self._open.score(jobs)
        return results, dict(self._open.counters)

    def sample(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        """Answer as the teacher."""
        return self._open.sampler().generate(requests)

    async def shutdown(self) -> None:
        if self._teacher is not None:
            await self._teacher.close()

    @property
    def _open(self) -> ServedTeacher:
        if self._teacher is None:
            raise EngineError("the teacher is not open: start it first")
        return self._teacher
