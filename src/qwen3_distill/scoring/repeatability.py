"""Checks that a teacher gives the same tokens the same scores, in any batch.

Shape letters: N scored tokens of all jobs.
"""

from collections.abc import Sequence

import numpy as np

from qwen3_distill.errors import HandshakeError
from qwen3_distill.ports import TeacherScorer
from qwen3_distill.types import FloatArray, ScoreFailure, ScoreResult, ScoringJob


async def check_repeatable(
    teacher: TeacherScorer, jobs: Sequence[ScoringJob], *, tolerance_nats: float
) -> float:
    """Score jobs together and alone; return the largest difference in nats.

    Raises:
        HandshakeError: scores of the same tokens differ by more than the tolerance: they depend on
            the batch. Or there is no score.
    """
    together = await teacher.score(jobs)
    worst = float((await gaps_alone(teacher, jobs, together)).max())
    if worst > tolerance_nats:
        raise HandshakeError(
            f"teacher {teacher.teacher_id}: the same tokens scored twice differ by {worst:.4f} "
            f"nats, more than {tolerance_nats}"
        )
    return worst


async def gaps_alone(
    teacher: TeacherScorer, jobs: Sequence[ScoringJob], together: Sequence[ScoreResult]
) -> FloatArray:
    """Score each job alone; return [N] distances in nats from its score in a batch.

    Raises:
        HandshakeError: there is no score.
    """
    alone = [(await teacher.score([job]))[0] for job in jobs]
    return gaps(teacher.teacher_id, alone, together)


def gaps(
    teacher_id: str, results: Sequence[ScoreResult], others: Sequence[ScoreResult]
) -> FloatArray:
    """Return [N] distances in nats between two scores of the same tokens.

    Raises:
        HandshakeError: a job has no score.
    """
    found: list[FloatArray] = []
    for one, other in zip(results, others, strict=True):
        if isinstance(one, ScoreFailure) or isinstance(other, ScoreFailure):
            raise HandshakeError(f"teacher {teacher_id} gives no score: {one}, {other}")
        found.append(np.abs(one.logprobs - other.logprobs))
    return np.concatenate(found)
