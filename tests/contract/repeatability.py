"""Checks that a teacher gives the same tokens the same scores, in any batch."""

from collections.abc import Sequence

import numpy as np

from qwen3_distill.errors import HandshakeError
from qwen3_distill.ports import TeacherScorer
from qwen3_distill.types import ScoreFailure, ScoringJob


async def check_repeatable(
    teacher: TeacherScorer, jobs: Sequence[ScoringJob], *, tolerance_nats: float
) -> float:
    """Score jobs together and alone; return the largest difference in nats.

    Raises:
        HandshakeError: scores of the same tokens differ by more than the tolerance: they depend on
            the batch.
    """
    together = await teacher.score(jobs)
    worst = 0.0
    for job, score in zip(jobs, together, strict=True):
        (alone,) = await teacher.score([job])
        if isinstance(score, ScoreFailure) or isinstance(alone, ScoreFailure):
            raise HandshakeError(f"teacher {teacher.teacher_id} gives no score: {score}, {alone}")
        worst = max(worst, float(np.abs(alone.logprobs - score.logprobs).max()))
    if worst > tolerance_nats:
        raise HandshakeError(
            f"teacher {teacher.teacher_id}: the same tokens scored twice differ by {worst:.4f} "
            f"nats, more than {tolerance_nats}"
        )
    return worst
