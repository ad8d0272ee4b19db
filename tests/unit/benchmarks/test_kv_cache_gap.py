"""The figures of caches in FP8, from runs that are there."""

import pytest

from benchmarks.learning.kv_cache_gap import figures_of


def test_a_case_has_the_mean_over_tokens_and_the_largest() -> None:
    steps = [
        {"tokens": 100.0, "gap_nats": 0.02, "largest_nats": 0.5},
        {"tokens": 300.0, "gap_nats": 0.04, "largest_nats": 0.3},
    ]
    figures = figures_of({"plain": {"accuracy": 0.8, "steps": steps}})
    assert figures["plain_gap_nats"] == pytest.approx(0.035)
    assert (figures["plain_largest_nats"], figures["plain_accuracy"]) == (0.5, 0.8)
