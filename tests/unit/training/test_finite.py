"""Weights that are not finite are found, whichever dtype, place or sign they have."""

import pytest
import torch

from qwen3_distill.training.finite import FiniteCheck


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 7_777, -1])
def test_one_bad_element_is_found(dtype: torch.dtype, value: float, place: int) -> None:
    bad = torch.zeros(10_000, dtype=dtype)
    bad[place] = value
    check = FiniteCheck()
    named = {"good": torch.ones(3, dtype=dtype), "bad": bad, "empty": torch.empty(0)}
    assert dict(check.passing(named.items())).keys() == named.keys()
    assert check.not_finite() == ["bad"]


def test_the_largest_finite_number_is_finite() -> None:
    check = FiniteCheck()
    largest = torch.full((5,), torch.finfo(torch.float32).max)
    assert [name for name, _ in check.passing([("largest", largest)])] == ["largest"]
    assert check.not_finite() == []


def test_nothing_that_passed_is_finite() -> None:
    assert FiniteCheck().not_finite() == []
