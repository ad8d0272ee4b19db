"""The mean of several teachers in probability space, for the sampled token.

    q(token) = sum_m w_m q_m(token)

with every member's own logprob of the token, so it is exact for any kind of teacher. Candidates
are another matter: a member names its own most likely tokens only, and of the others' it tells no
logprob. `scoring.embedded.ensemble` averages whole distributions instead.

Shape letters: M members, S scored tokens.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from qwen3_distill.errors import EngineError
from qwen3_distill.ports import TeacherScorer
from qwen3_distill.scoring.members import TeacherGroup, merged
from qwen3_distill.types import (
    FloatArray,
    ScoreFailure,
    ScoreResult,
    ScoringJob,
    TeacherScore,
)
from qwen3_distill.utils.concurrency import together


class EnsembleTeacher(TeacherGroup):
    """A `TeacherScorer` that gives the logprobs of a mean of distributions.

    Args:
        members: at least one; each scores the sampled token.
        shares: weight of each, together 1.
    """

    def __init__(self, members: Sequence[TeacherScorer], shares: Sequence[float]) -> None:
        super().__init__(members)
        self._shares = tuple(shares)

    @property
    def teacher_id(self) -> str:
        return ensemble_id([member.teacher_id for member in self.members], self._shares)

    @property
    def counters(self) -> Mapping[str, float]:
        """Sums over the members, and every member's own as ``ensemble/{index}_...``."""
        return merged({f"ensemble/{index}": one.counters for index, one in enumerate(self.members)})

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        """See `TeacherScorer.score`. A job that one member gives no score for gets none."""
        answers = await together(*(member.score(jobs) for member in self.members))
        return [
            self._mean(job, results)
            for job, results in zip(jobs, zip(*answers, strict=True), strict=True)
        ]

    def _mean(self, job: ScoringJob, results: Sequence[ScoreResult]) -> ScoreResult:
        logprobs: list[FloatArray] = []
        for member, result in zip(self.members, results, strict=True):
            if isinstance(result, ScoreFailure):
                return result
            if result.teacher_id != member.teacher_id:
                raise EngineError(
                    f"rollout {job.rollout_id}: a member of the ensemble is {member.teacher_id}, "
                    f"and its score is of {result.teacher_id}"
                )
            logprobs.append(result.logprobs)
        mean_S = mean_logprobs(np.stack(logprobs), self._shares)
        return TeacherScore(teacher_id=self.teacher_id, logprobs=mean_S)


def mean_logprobs(logprobs_MS: FloatArray, shares: Sequence[float]) -> FloatArray:
    """Return [S] nats: log sum_m w_m exp(logprob_m), computed without underflow."""
    weighted_MS = logprobs_MS.astype(np.float64) + np.log(np.asarray(shares))[:, None]
    return np.logaddexp.reduce(weighted_MS, axis=0).astype(np.float32)


def ensemble_id(ids: Sequence[str], shares: Sequence[float]) -> str:
    """Return the name of a mean: its members' ids, each with its share."""
    parts = (f"{share:.9g}*{name}" for share, name in zip(shares, ids, strict=True))
    return f"mean({' + '.join(parts)})"
