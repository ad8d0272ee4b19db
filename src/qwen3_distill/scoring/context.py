"""The view of a teacher with a context of its own: other tokens before the same response."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwen3_distill.errors import DataError
from qwen3_distill.ports import TeacherScorer
from qwen3_distill.scoring.views import SameView
from qwen3_distill.types import Metric, Rollout, ScoreFailure, ScoringJob


class ContextView(SameView):
    """A `TeacherView`: the teacher reads its own context, then the response's own token ids."""

    def job(self, rollout: Rollout) -> ScoringJob:
        """Return the teacher's context and the response; the sampled tokens are scored.

        Raises:
            DataError: the rollout's prompt has no context for the teacher.
        """
        context_ids = rollout.prompt.teacher_ids
        if context_ids is None:
            raise DataError(
                f"rollout {rollout.rollout_id} has no context for the teacher, and scoring.context "
                "is set; sample it with this config, or set scoring.context to null"
            )
        read = replace(rollout.prompt, token_ids=context_ids, teacher_ids=None)
        return super().job(replace(rollout, prompt=read))


@dataclass(frozen=True, kw_only=True)
class ContextComparison:
    """Measures what the context tells the teacher: it scores some rollouts with and without it."""

    every_steps: int
    num_rollouts: int

    def is_due(self, step: int) -> bool:
        """Whether to compare after this many steps: after the first, and every `every_steps`."""
        return step == 1 or step % self.every_steps == 0

    async def metrics(self, teacher: TeacherScorer, rollouts: Sequence[Rollout]) -> list[Metric]:
        """Score the first rollouts twice, in one call; return means over their sampled tokens.

        ``context/with_nats`` and ``context/without_nats`` are the teacher's mean logprob of the
        student's tokens, ``context/abs_difference_nats`` the mean of |with - without|. There is
        none if the teacher gave no pair of scores.
        """
        sample = [r for r in rollouts if r.prompt.teacher_ids is not None][: self.num_rollouts]
        if not sample:
            return []
        views = (ContextView(), SameView())
        results = await teacher.score([view.job(rollout) for view in views for rollout in sample])
        pairs = [
            (told.logprobs.astype("f8"), untold.logprobs.astype("f8"))
            for told, untold in zip(results[: len(sample)], results[len(sample) :], strict=True)
            if not isinstance(told, ScoreFailure) and not isinstance(untold, ScoreFailure)
        ]
        if not pairs:
            return []
        count = sum(told.size for told, _ in pairs)
        totals = {
            "with": sum(float(told.sum()) for told, _ in pairs),
            "without": sum(float(untold.sum()) for _, untold in pairs),
            "abs_difference": sum(float(abs(told - untold).sum()) for told, untold in pairs),
        }
        return [Metric.mean(f"context/{key}_nats", total, count) for key, total in totals.items()]
