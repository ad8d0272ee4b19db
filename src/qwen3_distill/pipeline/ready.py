"""Rollouts that wait for a batch, and which of them a batch takes."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from qwen3_distill.types import FinishReason, Rollout, TrainingRollout


@dataclass(frozen=True)
class Ready:
    """A rollout that may be trained on, or a piece of one, and the rollout's number."""

    number: int
    scored: TrainingRollout

    @property
    def rollout(self) -> Rollout:
        return self.scored.rollout

    @property
    def is_last(self) -> bool:
        """Whether the rollout has ended, so that no piece follows."""
        return self.rollout.finish_reason is not FinishReason.HARVESTED


def whole_groups(ready: Sequence[Ready], unsettled: Set[int], samples: int) -> list[Ready]:
    """Return the rollouts of prompts whose samples are all ready or dropped: reward baselines.

    Args:
        unsettled: numbers of all rollouts in progress, ready ones included.
    """
    numbers = {item.number for item in ready}
    incomplete = {number // samples for number in unsettled - numbers}
    return [item for item in ready if item.number // samples not in incomplete]


def whole_prompts(ready: Sequence[Ready], size: int, samples: int) -> list[Ready]:
    """Return the first ``size``, without prompts whose samples the cut would split.

    The cut falls within a prompt only where samples were dropped.
    """
    behind = {item.number // samples for item in ready[size:]}
    return [item for item in ready[:size] if item.number // samples not in behind]
