"""Counts the rollouts that a step dropped."""

from collections import Counter
from typing import Literal, TypeAlias

from qwen3_distill.pipeline.recorder import ledger_entry
from qwen3_distill.types import (
    Metric,
    Rollout,
)

Cause: TypeAlias = Literal["stale", "no score", "unaligned"]
"""Why a rollout was dropped."""


class Drops:
    """Rollouts, and pieces of them, that were dropped since the last step, by cause."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.last_reason = ""
        self.unscored: Counter[str] = Counter()
        """Rollouts that got no score, by the id of the teacher that had to give it."""
        self._rollouts: dict[Cause, int] = {"stale": 0, "no score": 0, "unaligned": 0}
        self._tokens = 0

    def add(
        self, number: int, rollout: Rollout, cause: Cause, reason: str, teacher_id: str | None
    ) -> None:
        """Count a dropped rollout, or a piece of one.

        Args:
            teacher_id: of the teacher that had to score it; None without a teacher.
        """
        self.entries.append(f"{ledger_entry(number, rollout)}:{cause.replace(' ', '-')}")
        self.last_reason = f"{rollout.rollout_id}: {reason}"
        self._rollouts[cause] += 1
        if cause == "no score" and teacher_id is not None:
            self.unscored[teacher_id] += 1
        self._tokens += rollout.num_tokens

    def count(self, cause: Cause) -> int:
        return self._rollouts[cause]

    def metrics(self) -> list[Metric]:
        return [
            Metric.sum(
                "score/dropped_rollouts", self._rollouts["no score"] + self._rollouts["unaligned"]
            ),
            Metric.sum("staleness/dropped_rollouts", self._rollouts["stale"]),
            Metric.sum("tokens/dropped", self._tokens),
        ]
