"""Where a learner stands in a group of ranks, and the share of a step that it takes.

No torch here: the controller deals shares, and a worker of unsloth imports this before unsloth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qwen3_distill.types import Batch


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """One rank of a group of learners that take their steps together."""

    index: int
    """0 .. count - 1. Rank 0 saves and publishes."""
    count: int
    address: str
    """``host:port`` at which rank 0 listens while the group forms."""
    timeout_s: float
    """How long the group may take to form, and a rank may wait for the others in a step."""
    sharded: bool = False
    """Whether the ranks divide the student's layers, their gradients and moments."""


@dataclass(frozen=True, kw_only=True)
class StepShare:
    """A rank's rollouts of one step, with the numbers of the whole step."""

    batch: Batch | None
    """None: the step has fewer rollouts than ranks, and this rank only takes part in the sum."""
    denominator: float
    """`Batch.denominator` of the whole step."""
    num_loss_tokens: int
    """Sampled tokens of the whole step."""
    lag_steps: int
    """Age in optimizer steps of the whole step's oldest token."""
    longest_id: str
    """Rollout of the whole step with the most tokens, so that all ranks refuse it, or none."""
    longest_tokens: int
    example_of: Mapping[str, str]
    """By sampler, the id of a rollout of the whole step, for the same reason."""

    @property
    def num_rollouts(self) -> int:
        """The rank's rollouts."""
        return 0 if self.batch is None else len(self.batch.scored)


def deal(tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Deal indices to ranks so that the ranks' sums of tokens are close.

    The longest goes first, to the rank with the fewest tokens so far (Graham's LPT rule, at most
    4/3 of the best split). Deterministic; every index occurs exactly once, each rank's are sorted.
    """
    loads = [0] * num_ranks
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in sorted(range(len(tokens)), key=lambda index: (-tokens[index], index)):
        rank = loads.index(min(loads))
        loads[rank] += tokens[index]
        dealt[rank].append(index)
    return [sorted(indices) for indices in dealt]


def shares_of(batch: Batch, num_ranks: int, lag_steps: int) -> list[StepShare]:
    """Split a step's batch into the ranks' shares."""
    tokens = [s.rollout.prompt.token_ids.size + s.rollout.num_tokens for s in batch.scored]
    longest = max(range(len(tokens)), key=tokens.__getitem__)
    whole = StepShare(
        batch=batch,
        denominator=batch.denominator,
        num_loss_tokens=batch.num_loss_tokens,
        lag_steps=lag_steps,
        longest_id=batch.scored[longest].rollout.rollout_id,
        longest_tokens=tokens[longest],
        example_of={s.rollout.sampled_by: s.rollout.rollout_id for s in batch.scored},
    )
    return [replace(whole, batch=_part(batch, rows)) for rows in deal(tokens, num_ranks)]


def _part(batch: Batch, rows: Sequence[int]) -> Batch | None:
    if not rows:
        return None
    chosen = np.asarray(rows)
    return replace(
        batch,
        scored=tuple(batch.scored[row] for row in rows),
        importance_weights=batch.importance_weights[chosen],
        task_advantages=batch.task_advantages[chosen],
    )
