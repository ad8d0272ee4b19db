"""Means over seeds with Student's interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95% quantiles of Student's t with 1, 2, ... degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class MeanOfSeeds:
    """A mean with its two-sided 95% interval; None where one seed gives none."""

    mean: float
    low: float | None
    high: float | None
    num_seeds: int

    def figures(self, name: str) -> dict[str, float]:
        """Return the mean under a name, and its interval, if any, as ``_low`` and ``_high``."""
        if self.low is None or self.high is None:
            return {name: self.mean}
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def mean_of_seeds(values: Sequence[float]) -> MeanOfSeeds:
    """The mean of one value per seed.

    Raises:
        ValueError: no value, or more than the 10 that the table of quantiles reaches to.
    """
    if not 1 <= len(values) <= len(_T_95) + 1:
        raise ValueError(f"{len(values)} seeds, expected 1 to {len(_T_95) + 1}")
    mean = fmean(values)
    if len(values) == 1:
        return MeanOfSeeds(mean=mean, low=None, high=None, num_seeds=1)
    half = _T_95[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return MeanOfSeeds(mean=mean, low=mean - half, high=mean + half, num_seeds=len(values))
