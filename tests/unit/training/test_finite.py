"""Weights that are not finite are found, whichever dtype, place or sign they have."""

import pytest
import torch

from qwen3_distill.errors import ConfigError
from qwen3_distill.training.finite import FiniteCheck, remedy
from qwen3_distill.training.fp8_base import check_gradient
from qwen3_distill.training.gradient_probe import Probe


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


def test_a_share_of_the_multiprocessors_is_named_where_values_are_not_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", raising=False)
    assert remedy("take a lower learning_rate") == "take a lower learning_rate"
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100")
    assert remedy("take a lower learning_rate") == "take a lower learning_rate"
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "75")
    named = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=75 is set"
    assert named in remedy("take a lower learning_rate")

    def gradient(value: float) -> Probe:
        return Probe(torch.zeros(1), {"0.weight": torch.tensor([value, 1.0])})

    with pytest.raises(ConfigError, match=named):
        check_gradient(gradient(float("nan")), gradient(1.0), "fp8_backward")
    with pytest.raises(ConfigError, match="than rounding does; use as_loaded"):
        check_gradient(gradient(9.0), gradient(1.0), "fp8_backward")
