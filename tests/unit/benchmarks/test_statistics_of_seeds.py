"""Student's interval over seeds."""

import pytest

from benchmarks.lib.statistics_of_seeds import MeanOfSeeds, mean_of_seeds


def test_interval_by_hand() -> None:
    # mean 3, standard deviation sqrt(2.5), t(4) = 2.776
    found = mean_of_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * (2.5 / 5) ** 0.5
    assert found.mean == 3.0
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half))
    assert found.num_seeds == 5


def test_two_seeds_have_one_degree_of_freedom() -> None:
    assert mean_of_seeds([0.0, 2.0]).high == pytest.approx(1 + 12.706 * 2**0.5 / 2**0.5)


def test_one_seed_has_no_interval() -> None:
    assert mean_of_seeds([0.5]) == MeanOfSeeds(mean=0.5, low=None, high=None, num_seeds=1)


@pytest.mark.parametrize("count", [0, 11])
def test_no_seed_and_too_many_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="seeds, expected 1 to 10"):
        mean_of_seeds([0.1] * count)
