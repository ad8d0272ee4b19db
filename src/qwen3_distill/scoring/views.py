"""Views: how a teacher looks at a student's rollout.

A view turns a rollout into the tokens that the teacher reads, and the teacher's result back into a
score of the student's sampled tokens. It also says which teachers fit a student.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from qwen3_distill.scoring.handshake import check_compatible
from qwen3_distill.types import (
    AlignedRollout,
    ModelIdentity,
    Rollout,
    ScoredRollout,
    ScoreFailure,
    ScoreResult,
    ScoringJob,
    TokenSpan,
    UnalignedRollout,
)


class TeacherView(Protocol):
    """Decides what a teacher reads of a rollout, and what its scores mean for the student."""

    def check(self, student: ModelIdentity, teacher: ModelIdentity) -> None:
        """Raise unless the teacher can score the student's tokens in this view.

        Raises:
            HandshakeError: names every difference and its remedy.
        """
        ...

    def job(self, rollout: Rollout) -> ScoringJob | UnalignedRollout:
        """Return the tokens that the teacher is asked about, or why there are none."""
        ...

    def jobs(self, rollouts: Sequence[Rollout]) -> Sequence[ScoringJob | UnalignedRollout]:
        """Return `job` of each rollout; a view may have less to do for many together."""
        return [self.job(rollout) for rollout in rollouts]

    def scored(
        self, rollout: Rollout, result: ScoreResult
    ) -> ScoredRollout | AlignedRollout | ScoreFailure:
        """Return the rollout with its score, or the failure unchanged.

        Args:
            result: the teacher's answer to `job` of the same rollout.

        Raises:
            AlignmentError: the score has another number of tokens than the student sampled.
        """
        ...


class SameView(TeacherView):
    """A `TeacherView`: the teacher reads the student's own tokens, prompt first."""

    def check(self, student: ModelIdentity, teacher: ModelIdentity) -> None:
        """Raise unless tokenizer, vocabulary, end-of-sequence ids and chat template are equal."""
        check_compatible(student, teacher)

    def job(self, rollout: Rollout) -> ScoringJob:
        """Return prompt and response; the sampled tokens are scored."""
        first = int(rollout.prompt.token_ids.size)
        return ScoringJob(
            rollout_id=rollout.rollout_id,
            token_ids=np.concatenate([rollout.prompt.token_ids, rollout.response_ids]),
            scored=tuple(
                TokenSpan(start=first + span.start, stop=first + span.stop)
                for span in rollout.sampled
            ),
            candidate_ids=rollout.candidate_ids,
        )

    def scored(self, rollout: Rollout, result: ScoreResult) -> ScoredRollout | ScoreFailure:
        """Return the rollout with its score, or the failure unchanged."""
        if isinstance(result, ScoreFailure):
            return result
        return ScoredRollout(rollout=rollout, score=result)
