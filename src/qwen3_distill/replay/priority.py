"""Draws rollouts from a replay buffer by priority, and gives the weights that correct for it.

Shape letters: M places of the buffer, live or not, in B blocks of K; n rollouts drawn.

A draw takes n distinct rollouts, rollout i with inclusion probability pi_i = n P_i, by systematic
sampling (Madow 1949): the pi_i are laid end to end on a line of length n, and the points u, u + 1,
..., u + n - 1, with one uniform u, select the rollouts that they fall on. The pi_i are then exact
for every law, which sequential drawing without replacement does not give, and an unbiased
importance weight needs nothing else (Horvitz and Thompson 1952). Drawing with replacement would be
unbiased as well, but would train on a rollout twice in one step.
"""

import math
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qwen3_distill.config import ReplayLaw
from qwen3_distill.errors import DataError

MIN_DECAY_EXPONENT = -60.0
"""Lower bound of the age decay's exponent: an old rollout becomes unlikely, not impossible."""

_BLOCK = 16
"""Places per block: a draw searches sums of blocks first, then places within a block."""
_UP_TO = np.triu(np.ones((_BLOCK, _BLOCK)))
"""[K, K] a row times this is its running sum, several times faster than `np.cumsum` of many short
rows. A place without mass adds an exact 0, so a search never ends on it."""

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]


class Draw(NamedTuple):
    """The result of a draw."""

    places_n: Integers
    """Ascending."""
    inclusion_n: Floats
    """Each one's inclusion probability pi_i."""


def priority_mass(law: ReplayLaw, priority: Floats) -> Floats:
    """Return a rollout's unnormalised share by its priority, before age or rank; > 0."""
    if law.kind == "uniform":
        return np.ones_like(priority)
    if law.kind == "proportional":
        return priority**law.alpha
    return priority


def draw_mass(law: ReplayLaw, mass_M: Floats, oldest_step_M: Integers, step: int) -> Floats:
    """Return [M] numbers proportional to P at ``step``; 0 where ``mass_M`` is 0.

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
    """rank^-alpha with rank 1 for the largest; ties by place; 0 stays 0."""
    ranked_M = np.empty_like(mass_M)
    order_M = np.argsort(-mass_M, kind="stable")
    ranked_M[order_M] = np.arange(1, len(mass_M) + 1, dtype=mass_M.dtype) ** -alpha
    return np.where(mass_M > 0, ranked_M, 0.0)


def _with_floor(mass_M: Floats, fraction: float) -> Floats:
    live_M = mass_M > 0
    return (1 - fraction) * mass_M / mass_M.sum() + fraction * live_M / live_M.sum()


class Masses:
    """Masses of places, laid end to end. Finds the places of a few points without a sum over all.

    It keeps sums of blocks of places. `set` recomputes the sums of the blocks that it changes, so
    that rounding errors do not accumulate.

    Args:
        mass_M: the masses to begin with; copied.
    """

    def __init__(self, mass_M: Floats) -> None:
        blocks = -(-len(mass_M) // _BLOCK)
        self._mass_BK = np.zeros((blocks, _BLOCK))
        self.mass_M = self._mass_BK.reshape(-1)[: len(mass_M)]
        """Changed by `set` only."""
        self._sum_B = np.zeros(blocks)
        self._before_B = np.zeros(blocks + 1)
        """Mass before each block, and the total last."""
        self.set(slice(0, len(mass_M)), mass_M)

    def set(self, places: slice | Integers, mass: Floats | float) -> None:
        """Give places new masses."""
        self.mass_M[places] = mass
        if isinstance(places, slice):
            start, stop, _ = places.indices(len(self.mass_M))
            changed: slice | Integers = slice(start // _BLOCK, -(-stop // _BLOCK))
        else:
            changed = places // _BLOCK
        # Not a product with ones: its rounding depends on how many blocks there are, and a buffer
        # that is restored must go on bit for bit.
        self._sum_B[changed] = np.add.reduce(self._mass_BK[changed], axis=1)

    def total(self) -> float:
        """Sum of the masses, as `places` uses it. Updates what `places` reads."""
        self._sum_B.cumsum(out=self._before_B[1:])
        return float(self._before_B[-1])

    def may_exceed(self, limit: float) -> bool:
        """Whether a mass may reach the limit. False is certain; sums of blocks often suffice."""
        return bool(self._sum_B.max() >= limit) and bool(self.mass_M.max() >= limit)

    def places(self, points_n: Floats) -> Integers:
        """Find the place on whose mass each ascending point of [0, `total`) falls.

        `total` must have been called after the last `set`.
        """
        block_n = self._before_B.searchsorted(points_n, side="right") - 1
        rest_n = points_n - self._before_B[block_n]
        end_nK = self._mass_BK.take(block_n, axis=0) @ _UP_TO
        is_passed_nK = end_nK <= rest_n[:, None]
        places_n = block_n * _BLOCK + is_passed_nK.argmin(axis=1)  # the first that is not
        if is_passed_nK[:, -1].any() or (places_n[1:] <= places_n[:-1]).any():
            return self._places_by_one_sum(points_n)  # rounding carried a point past an edge
        return places_n

    def _places_by_one_sum(self, points_n: Floats) -> Integers:
        """Do the same for any points: of two that fall on one place, one moves to the next."""
        end_M, each_n = np.cumsum(self.mass_M), np.arange(len(points_n))
        limit = math.nextafter(float(end_M[-1]), 0.0)
        scaled_n = np.minimum(points_n * (float(end_M[-1]) / self._before_B[-1]), limit)
        live = np.flatnonzero(self.mass_M)
        ranks_n = np.searchsorted(live, np.searchsorted(end_M, scaled_n, side="right"))
        ranks_n = np.maximum.accumulate(ranks_n - each_n) + each_n
        return live[np.minimum(ranks_n, len(live) - len(points_n) + each_n)]


def systematic_draw(masses: Masses, count: int, offset: float) -> Draw:
    """Draw ``count`` distinct places, each with probability proportional to its mass.

    A place whose probability would exceed 1 is drawn for certain, and the others share the rest.

    Args:
        masses: 0 where nothing may be drawn.
        offset: uniform in [0, 1).

    Raises:
        DataError: fewer than ``count`` places have a mass.
    """
    total = masses.total()
    # Where this does not hold, there are more than ``count``, and none exceeds probability 1.
    if count < 1 or masses.may_exceed(total / count):
        _require(masses.mass_M, count)
        masses = Masses(_capped(masses.mass_M, count))
        total = masses.total()
    points_n = (np.arange(count, dtype=np.float64) + offset) * (total / count)
    # Rounding must not carry the last point past the last place that has a mass.
    np.minimum(points_n, math.nextafter(total, 0.0), out=points_n)
    places_n = masses.places(points_n)
    return Draw(places_n, masses.mass_M[places_n] * (count / total))


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
