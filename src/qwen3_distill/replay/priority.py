"""Which rollouts are drawn from a replay buffer, and what corrects for it. Formulas of tensors.

Shape letters: M places of the buffer, live or not; n rollouts drawn.

A draw takes n different rollouts, rollout i with inclusion probability pi_i = n P_i, by systematic
sampling (Madow 1949): the pi_i are laid end to end on a line of length n, and the rollouts that
the points u, u + 1, ..., u + n - 1 fall on are taken, with one uniform u. The pi_i are then exact
for every law, which no rule for drawing one after another without replacement gives, and they are
all that an unbiased importance weight needs (Horvitz and Thompson 1952). Drawing with replacement
would be unbiased as well, but would train on a rollout twice in one step.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3_distill.config import ReplayLaw
from qwen3_distill.errors import DataError

MIN_DECAY_EXPONENT = -60.0
"""Of the age decay: an old rollout becomes unlikely, not impossible."""


class Draw(NamedTuple):
    """What was drawn, on the buffer's device."""

    places_n: Tensor
    """int64, ascending."""
    inclusion_n: Tensor
    """float64: the probability with which each of them was to be drawn."""


def priority_mass(law: ReplayLaw, priority: Tensor) -> Tensor:
    """float64: what a rollout's priority makes of its share, before age or rank is known; > 0."""
    priority = priority.double()
    if law.kind == "uniform":
        return torch.ones_like(priority)
    if law.kind == "proportional":
        return priority.pow(law.alpha)
    return priority


def draw_mass(law: ReplayLaw, mass_M: Tensor, oldest_step_M: Tensor, step: int) -> Tensor:
    """[M] numbers that P is proportional to at ``step``; 0 where ``mass_M`` is 0.

    With p the priority and age the steps since the oldest token's weights:

        uniform       P ~ 1
        proportional  P ~ (p exp(-age / tau))^alpha    arXiv 1511.05952, decay of 2604.16918
        rank          P ~ rank^-alpha                  arXiv 1511.05952; by p exp(-age / tau)

    then P <- (1 - f) P + f / N over the N live rollouts, f = ``uniform_fraction``.
    """
    if law.kind == "uniform":
        return mass_M
    power = law.alpha if law.kind == "proportional" else 1.0
    if law.age_decay_steps is not None:
        exponent_M = (oldest_step_M - step) * (power / law.age_decay_steps)
        mass_M = mass_M * exponent_M.clamp(min=MIN_DECAY_EXPONENT).exp()
    if law.kind == "rank":
        mass_M = _by_rank(mass_M, law.alpha)
    if law.uniform_fraction > 0:
        mass_M = _with_floor(mass_M, law.uniform_fraction)
    return mass_M


def _by_rank(mass_M: Tensor, alpha: float) -> Tensor:
    """rank^-alpha with rank 1 for the largest; equal ones by their place; 0 stays 0."""
    order_M = mass_M.argsort(descending=True, stable=True)
    ranks_M = torch.arange(1, len(mass_M) + 1, dtype=mass_M.dtype, device=mass_M.device)
    ranked_M = torch.empty_like(mass_M).scatter_(0, order_M, ranks_M.pow(-alpha))
    return torch.where(mass_M > 0, ranked_M, 0.0)


def _with_floor(mass_M: Tensor, fraction: float) -> Tensor:
    live_M = (mass_M > 0).to(mass_M.dtype)
    return (1 - fraction) * mass_M / mass_M.sum() + fraction * live_M / live_M.sum()


def systematic_draw(
    mass_M: Tensor, count: int, generator: torch.Generator, edges_M: Tensor | None = None
) -> Draw:
    """Draw ``count`` different places, each with probability proportional to its mass.

    What would exceed probability 1 is drawn for certain, and the others share the rest.

    Args:
        mass_M: float64; 0 where nothing may be drawn.
        edges_M: float64, overwritten: on a CPU new memory costs more than the sums put into it.

    Raises:
        DataError: fewer than ``count`` places have a mass.
    """
    edges_M = torch.cumsum(mass_M, 0, out=edges_M)
    total, largest = torch.stack([edges_M[-1], mass_M.max()]).tolist()
    # Where this does not hold, there are more than ``count``, and none exceeds probability 1.
    if count < 1 or largest * count >= total:
        _require(mass_M, count)
        mass_M = _capped(mass_M, count)
        edges_M = torch.cumsum(mass_M, 0, out=edges_M)
        total = edges_M[-1].item()
    device = mass_M.device
    offset = torch.rand((), dtype=torch.float64, generator=generator, device=device)
    points_n = torch.arange(count, dtype=torch.float64, device=device).add_(offset)
    # Rounding must not carry the last point past the last place that has a mass.
    points_n.mul_(total / count).clamp_(max=math.nextafter(total, 0.0))
    places_n = torch.searchsorted(edges_M, points_n, right=True)
    return Draw(places_n, mass_M[places_n] * (count / total))


def _require(mass_M: Tensor, count: int) -> None:
    live = int(mass_M.count_nonzero())
    if not 1 <= count <= live:
        raise DataError(f"{count} rollouts asked of a replay buffer with {live} that may be drawn")


def _capped(mass_M: Tensor, count: int) -> Tensor:
    """[M] inclusion probabilities: proportional to the mass, at most 1, summing to ``count``."""
    certain_M = torch.zeros_like(mass_M, dtype=torch.bool)
    inclusion_M = mass_M
    for _ in range(count):
        free_M = mass_M.masked_fill(certain_M, 0.0)
        left = count - certain_M.sum()
        inclusion_M = (free_M * (left / free_M.sum())).masked_fill(certain_M, 1.0)
        beyond_M = (inclusion_M >= 1) & ~certain_M
        if not bool(beyond_M.any()):
            break
        certain_M |= beyond_M
        if int(certain_M.sum()) >= count:
            return certain_M.double()
    return inclusion_M


def importance_weights(inclusion_n: Tensor, beta: float) -> Tensor:
    """[n] float32 w_i = (1 / (N P_i))^beta, arXiv 1511.05952, with P_i = pi_i / n.

    Divided by the largest of the draw, which cancels N and n. Before that division and at beta = 1,
    the mean of w_i f_i over a draw has the mean of f over all N as its expectation, if each of them
    has a positive pi_i.
    """
    weights_n = inclusion_n.pow(-beta)
    return (weights_n / weights_n.max()).float()


def annealed(start: float, end: float, over_steps: int, step: int) -> float:
    """Linear from ``start`` at step 0 to ``end`` at ``over_steps`` and after."""
    return start + (end - start) * min(step / over_steps, 1.0)
