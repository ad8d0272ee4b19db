"""The worker of an embedded teacher: `EmbeddedTeacher`, served to the controller."""

from collections.abc import Sequence

import torch

from qwen3_distill.config import EmbeddedScoring
from qwen3_distill.errors import EngineError
from qwen3_distill.hosts.serve import serve_worker
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.types import ScoreRequest, ScoreResult, ScoringJob


class EmbeddedTeacherWorker:
    """The served object. Between two forward passes it answers pings."""

    def __init__(self) -> None:
        self._teacher: EmbeddedTeacher | None = None

    def open(self, config: EmbeddedScoring, request: ScoreRequest) -> str:
        """Load the teacher; return its id."""
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._teacher = EmbeddedTeacher(
            config.model,
            request=request,
            device=config.device,
            dtype=config.dtype,
            batch_tokens=config.batch_tokens,
            chunk_tokens=config.chunk_tokens,
        )
        return self._teacher.teacher_id

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        if self._teacher is None:
            raise EngineError("the teacher is not open: start it first")
        return await self._teacher.score(jobs)


if __name__ == "__main__":
    serve_worker(EmbeddedTeacherWorker())
