"""The tables and the plot say what the result says."""

import re
from typing import Any

import pytest

from benchmarks.learning.staleness_page import (
    page,
    percent,
    plot,
    ranking,
    replay_table,
    staleness_table,
)


def of_seeds(mean: float, half: float | None = 0.02) -> dict[str, Any]:
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high, "num_seeds": 5}


def row(mean: float, **keys: Any) -> dict[str, Any]:
    return {
        "accuracy": of_seeds(mean),
        "vs_reference": of_seeds(mean - 0.7, 0.03),
        "ratio_capped_fraction": 0.015,
        "generated_tokens": 61_234.0,
        "learner_tokens": 122_400.0,
        **keys,
    }


def case(staleness: int, advantage: str, ratio: str, mean: float) -> dict[str, Any]:
    name = f"staleness_{staleness}_{advantage}_{ratio}"
    return row(mean, name=name, staleness=staleness, advantage=advantage, ratio=ratio)


CASES = [
    case(16, "old", "none", 0.1),
    case(0, "current", "truncated", 0.7),
    case(16, "current", "truncated", 0.6),
]
RESULT = {"cases": CASES, "replay_cases": [row(0.8, law="decayed_priority", budget="learner")]}


def test_a_value_carries_half_of_its_interval() -> None:
    assert percent(of_seeds(0.7256, 0.019)) == "72.6 ± 1.9"
    assert percent(of_seeds(0.5, None)) == "50.0"
    assert percent(None) == ""


def test_staleness_table_has_a_row_a_staleness_in_order() -> None:
    assert staleness_table(CASES).splitlines()[2:] == [
        "| 0 | 70.0 ± 2.0 |  |  |  |  |  |",
        "| 16 | 60.0 ± 2.0 |  |  |  | 10.0 ± 2.0 |  |",
    ]


def test_ranking_has_the_best_first() -> None:
    assert ranking(CASES, 16).splitlines()[2:] == [
        "| current advantage, truncated ratio | 60.0 ± 2.0 | -10.0 ± 3.0 | 1.5 |",
        "| old advantage, no ratio | 10.0 ± 2.0 | -60.0 ± 3.0 | 1.5 |",
    ]


def test_replay_table_begins_with_the_baseline() -> None:
    assert replay_table(RESULT).splitlines()[2:] == [
        "| no replay | 70.0 ± 2.0 | 0.0 ± 3.0 | 61.2 k | 122.4 k |",
        "| decayed priority, equal learner tokens | 80.0 ± 2.0 | 10.0 ± 3.0 | 61.2 k | 122.4 k |",
    ]


def test_page_leaves_out_what_was_not_run() -> None:
    assert page(RESULT).count("| --- |") == 3
    assert page({"cases": CASES, "replay_cases": []}).count("| --- |") == 2


def test_plot_has_a_dot_a_case_higher_for_the_better() -> None:
    svg = plot(CASES)
    dots = re.findall(r'<circle class="dot \w+" cx="([\d.]+)" cy="([\d.]+)" r="4"', svg)
    best, second, worst = sorted(float(y) for _, y in dots[: len(CASES)])
    assert (worst - second) / (second - best) == pytest.approx(5, rel=0.01)  # 50 and 10 points
    assert svg.count('class="whisker ') == len(CASES)
