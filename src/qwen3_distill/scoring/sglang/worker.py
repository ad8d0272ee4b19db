"""The worker of an SGLang teacher on another node: it starts the server there, on loopback.

So nothing of SGLang listens to the network, and the client's checks run next to the server.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from qwen3_distill.config import SglangScoring
from qwen3_distill.errors import EngineError
from qwen3_distill.hosts.serve import serve_worker
from qwen3_distill.scoring.sglang.server import MemoryFraction
from qwen3_distill.scoring.sglang.teacher import SglangTeacher
from qwen3_distill.types import Rollout, RolloutRequest, ScoreRequest, ScoreResult, ScoringJob


class SglangTeacherWorker:
    """The served object."""

    def __init__(self) -> None:
        self._teacher: SglangTeacher | None = None

    async def open(
        self,
        config: SglangScoring,
        request: ScoreRequest,
        memory_fraction: MemoryFraction,
        max_total_tokens: int | None,
    ) -> str:
        """Start the server; return the teacher's id. It writes into this process's own log."""
        self._teacher = SglangTeacher(
            config,
            request=request,
            memory_fraction=memory_fraction,
            max_total_tokens=max_total_tokens,
            log=Path("/proc/self/fd/1").resolve(),
        )
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
    def _open(self) -> SglangTeacher:
        if self._teacher is None:
            raise EngineError("the teacher is not open: start it first")
        return self._teacher


if __name__ == "__main__":
    serve_worker(SglangTeacherWorker())
