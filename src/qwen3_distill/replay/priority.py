"""Which rollouts are drawn from a replay buffer, and what corrects for it. Formulas of arrays.

Shape letters: M places of the buffer, live or not, in B blocks of K; n rollouts drawn.

A draw takes n different rollouts, rollout i with inclusion probability pi_i = n P_i, by systematic
sampling (Madow 1949): the pi_i are laid end to end on a line of length n, and the rollouts that
the points u, u + 1, ..., u + n - 1 fall on are taken, with one uniform u. The pi_i are then exact
for every law, which no rule for drawing one after another without replacement gives, and they are
all that an unbiased importance weight needs (Horvitz and Thompson 1952). Drawing with replacement
would be unbiased as well, but would train on a rollout twice in one step.
"""

import math
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qwen3_distill.config import ReplayLaw
from qwen3_distill.errors import DataError

MIN_DECAY_EXPONENT = -60.0
"""Of the age decay: an old rollout becomes unlikely, not impossible."""

_BLOCK = 16
"""Places that are summed as one when a draw looks for its points."""

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]


class Draw(NamedTuple):
    """What was drawn."""

    places_n: Integers
    """Ascending."""
    inclusion_n: Floats
    """The probability with which each of them was to be drawn."""


def priority_mass(law: ReplayLaw, priority: Floats) -> Floats:
    """What a rollout's priority makes of its share, before age or rank is known; > 0."""
    if law.kind == "uniform":
        return np.ones_like(priority)
    if law.kind == "proportional":
        return priority**law.alpha
    return priority


def draw_mass(law: ReplayLaw, mass_M: Floats, oldest_step_M: Integers, step: int) -> Floats:
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
        mass_M = mass_M * np.exp(np.maximum(exponent_M, MIN_DECAY_EXPONENT))
    if law.kind == "rank":
        mass_M = _by_rank(mass_M, law.alpha)
    if law.uniform_fraction > 0:
        mass_M = _with_floor(mass_M, law.uniform_fraction)
    return mass_M


def _by_rank(mass_M: Floats, alpha: float) -> Floats:
    """rank^-alpha with rank 1 for the largest; equal ones by their place; 0 stays 0."""
    ranked_M = np.empty_like(mass_M)
    order_M = np.argsort(-mass_M, kind="stable")
    ranked_M[order_M] = np.arange(1, len(mass_M) + 1, dtype=mass_M.dtype) ** -alpha
    return np.where(mass_M > 0, ranked_M, 0.0)


def _with_floor(mass_M: Floats, fraction: float) -> Floats:
    live_M = mass_M > 0
    return (1 - fraction) * mass_M / mass_M.sum() + fraction * live_M / live_M.sum()


class _Line:
    """Masses laid end to end. Finds the places of a few points without a sum over every place."""

    def __init__(self, mass_M: Floats) -> None:
        padded_M = np.pad(mass_M, (0, -len(mass_M) % _BLOCK)) if len(mass_M) % _BLOCK else mass_M
        self._mass_M = mass_M
        self._mass_BK = padded_M.reshape(-1, _BLOCK)
        self._end_B = np.cumsum(self._mass_BK @ np.ones(_BLOCK))

    @property
    def total(self) -> float:
        return float(self._end_B[-1])

    def places(self, points_n: Floats) -> Integers:
        """On whose mass each of ascending points of [0, total) falls."""
        block_n = np.searchsorted(self._end_B, points_n, side="right")
        rest_n = points_n - np.where(block_n > 0, self._end_B[block_n - 1], 0.0)
        end_nK = np.cumsum(self._mass_BK[block_n], axis=1)
        places_n = block_n * _BLOCK + (end_nK <= rest_n[:, None]).sum(axis=1)
        if (rest_n >= end_nK[:, -1]).any() or (np.diff(places_n) <= 0).any():
            return self._places_by_one_sum(points_n)  # rounding carried a point past an edge
        return places_n

    def _places_by_one_sum(self, points_n: Floats) -> Integers:
        """As `places`, of any points: where two fall on one place, one moves to the next."""
        end_M, each_n = np.cumsum(self._mass_M), np.arange(len(points_n))
        limit = math.nextafter(float(end_M[-1]), 0.0)
        scaled_n = np.minimum(points_n * (float(end_M[-1]) / self.total), limit)
        live = np.flatnonzero(self._mass_M)
        ranks_n = np.searchsorted(live, np.searchsorted(end_M, scaled_n, side="right"))
        ranks_n = np.maximum.accumulate(ranks_n - each_n) + each_n
        return live[np.minimum(ranks_n, len(live) - len(points_n) + each_n)]


def systematic_draw(mass_M: Floats, count: int, generator: np.random.Generator) -> Draw:
    """Draw ``count`` different places, each with probability proportional to its mass.

    What would exceed probability 1 is drawn for certain, and the others share the rest.

    Args:
        mass_M: 0 where nothing may be drawn.

    Raises:
        DataError: fewer than ``count`` places have a mass.
    """
    line = _Line(mass_M)
    # Where this does not hold, there are more than ``count``, and none exceeds probability 1.
    if count < 1 or float(mass_M.max()) * count >= line.total:
        _require(mass_M, count)
        mass_M = _capped(mass_M, count)
        line = _Line(mass_M)
    points_n = (np.arange(count, dtype=np.float64) + generator.random()) * (line.total / count)
    # Rounding must not carry the last point past the last place that has a mass.
    places_n = line.places(np.minimum(points_n, math.nextafter(line.total, 0.0)))
    return Draw(places_n, mass_M[places_n] * (count / line.total))


def _require(mass_M: Floats, count: int) -> None:
    live = int(np.count_nonzero(mass_M))
    if not 1 <= count <= live:
        raise DataError(f"{count} rollouts asked of a replay buffer with {live} that may be drawn")


def _capped(mass_M: Floats, count: int) -> Floats:
    """[M] inclusion probabilities: proportional to the mass, at most 1, summing to ``count``."""
    certain_M = np.zeros(len(mass_M), dtype=bool)
    inclusion_M = mass_M
    for _ in range(count):
        free_M = np.where(certain_M, 0.0, mass_M)
        left = count - int(certain_M.sum())
        inclusion_M = np.where(certain_M, 1.0, free_M * (left / free_M.sum()))
        beyond_M = (inclusion_M >= 1) & ~certain_M
        if not beyond_M.any():
            break
        certain_M |= beyond_M
        if certain_M.sum() >= count:
            return certain_M.astype(np.float64)
    return inclusion_M


def importance_weights(inclusion_n: Floats, beta: float) -> NDArray[np.float32]:
    """[n] w_i = (1 / (N P_i))^beta, arXiv 1511.05952, with P_i = pi_i / n.

    Divided by the largest of the draw, which cancels N and n. Before that division and at beta = 1,
    the mean of w_i f_i over a draw has the mean of f over all N as its expectation, if each of them
    has a positive pi_i.
    """
    weights_n = inclusion_n**-beta
    return (weights_n / weights_n.max()).astype(np.float32)


def annealed(start: float, end: float, over_steps: int, step: int) -> float:
    """Linear from ``start`` at step 0 to ``end`` at ``over_steps`` and after."""
    return start + (end - start) * min(step / over_steps, 1.0)
