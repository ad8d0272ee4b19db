"""The benchmark of FP8 compares accuracies in pairs of runs with one seed."""

import pytest

from benchmarks.learning.fp8_accuracy import figures_of


def test_differences_are_paired_by_seed() -> None:
    accuracies = [("as_loaded", [0.5, 0.7]), ("fp8_backward", [0.6, 0.8])]
    runs = [
        {"case": case, "seed": seed, "accuracy": values[seed], "greedy": values[seed] + 0.1}
        for seed in range(2)
        for case, values in accuracies
    ]
    figures = figures_of(runs)
    assert figures["seeds"] == 2
    assert figures["fp8_backward_accuracy"] == pytest.approx(0.7)
    assert figures["fp8_backward_greedy"] == pytest.approx(0.8)
    for end in ("", "_low", "_high"):  # the same in each pair, so the interval is a point
        assert figures[f"fp8_backward_difference{end}"] == pytest.approx(0.1)
    assert figures["as_loaded_accuracy_low"] < 0 < 0.6 < figures["as_loaded_accuracy_high"]


def test_one_seed_has_no_interval() -> None:
    runs = [
        {"case": case, "seed": 0, "accuracy": 0.5, "greedy": 0.5}
        for case in ("as_loaded", "fp8_backward")
    ]
    assert "as_loaded_accuracy_low" not in figures_of(runs)
