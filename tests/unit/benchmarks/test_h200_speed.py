"""The figures of one H200, from results that were measured one by one."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import h200_speed
from benchmarks.speed.h200_speed import GOALS, NOTES, figures_of, is_met, verdicts, with_levers

ROWS = {
    "train_unsloth_128x512_n4_tok_s": 26_000.0,
    "train_unsloth_shared_128x512_n4_tok_s": 29_900.0,
    "train_unsloth_128xlongtail8_n1_tok_s": 20_000.0,
    "train_unsloth_packed_128xlongtail8_n1_tok_s": 21_000.0,
}
ONE_START: dict[str, Any] = {
    "figures": {
        "opd_tok_s_256x512": 9_440.0,
        "longtail8_vs_sequential": 2.05,
        "time_plan_error_pct": 9.0,
        "topk16_vs_sampled_step": 1.1,
        "ready_s": 80.0,
    },
    "parts": {"longtail8": {"streaming": {"tok_s": 7_000.0}}},
}
TIME_PLAN = {"figures": {"gb10_public_error_pct": 13.0, "time_plan_error_pct": 99.0}}


def test_ratios_are_of_the_results_that_are_there() -> None:
    results = {
        "h200_rows": {"figures": ROWS},
        "h200_one_start": ONE_START,
        "h200_trl": {"figures": {"trl_fixed_tok_s": 4_720.0, "trl_longtail8_tok_s": 2_000.0}},
        "h200_learners": {"figures": {"train_compiled_fp8_backward_vs_unsloth": 0.98}},
        "time_plan": TIME_PLAN,
    }
    assert figures_of(results) == {
        "train_fp8_vs_unsloth": 0.98,
        "train_prefix_n4_ratio": 1.15,
        "train_packing_longtail_ratio": 1.05,
        "opd_tok_s_256x512": 9_440.0,
        "fixed_vs_trl": 2.0,
        "longtail8_vs_trl": 3.5,
        "longtail8_vs_sequential": 2.05,
        "topk16_vs_sampled_step": 1.1,
        "time_plan_error_pct": 9.0,
        "gb10_public_error_pct": 13.0,
    }


def test_fp8_is_that_of_the_faster_learner() -> None:
    rates = {
        f"train_{name}_128x512_n4_tok_s": rate
        for name, rate in [
            ("unsloth", 100.0),
            ("compiled_fp8_backward", 98.0),
            ("unsloth_fp8_backward", 109.0),
        ]
    }
    assert figures_of({"h200_rows": {"figures": rates}})["train_fp8_vs_unsloth"] == 1.09


def test_a_learner_is_held_against_unsloth_on_its_own_card() -> None:
    later = {
        "train_unsloth_128x512_n4_tok_s": 30_000.0,
        "train_unsloth_shared_128x512_n4_tok_s": 33_000.0,
        "train_unsloth_packed_128xlongtail8_n1_tok_s": 90_000.0,  # of which unsloth's is not there
    }
    results = {"h200_rows": {"figures": ROWS}, "h200_rows_once": {"figures": later}}
    assert figures_of(results) == {
        "train_prefix_n4_ratio": 1.1,
        "train_packing_longtail_ratio": 1.05,
    }


def test_the_first_named_result_counts_and_the_machine_is_that_of_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = {"figures": {"topk16_vs_sampled_step": 1.05}, "parts": {}}
    results = {"h200_topk16": later, "h200_one_start": ONE_START}
    assert figures_of(results)["topk16_vs_sampled_step"] == 1.05
    assert figures_of(results)["opd_tok_s_256x512"] == 9_440.0
    for name, result in results.items():
        common = {"command": "c", "commit": "a", "machine": {"gpu": name}, "versions": {}}
        (tmp_path / f"{name}.json").write_text(json.dumps(result | common))
    monkeypatch.setattr("sys.argv", [h200_speed.__file__, "--results", str(tmp_path)])
    h200_speed.main()
    written = json.loads((tmp_path / "h200_speed.json").read_text())
    assert written["machine"] == {"gpu": "h200_one_start"}


def test_parts_of_a_second_start_count_where_the_first_lacks_them() -> None:
    tails = {
        "figures": {"longtail8_vs_sequential": 1.9, "opd_tok_s_256x512": 1.0},
        "parts": {"longtail8": {"streaming": {"tok_s": 6_000.0}}},
    }
    trl = {"figures": {"trl_longtail8_tok_s": 2_000.0}}
    first = {"figures": {"opd_tok_s_256x512": 9_440.0}}
    results = {"h200_one_start": first, "h200_tails": tails, "h200_trl": trl}
    assert figures_of(results) == {
        "opd_tok_s_256x512": 9_440.0,
        "longtail8_vs_trl": 3.0,
        "longtail8_vs_sequential": 1.9,
    }
    assert figures_of(results | {"h200_one_start": ONE_START})["longtail8_vs_trl"] == 3.5


def test_what_was_not_measured_has_no_figure_and_no_verdict() -> None:
    figures = figures_of({"h200_rows": {"figures": ROWS}, "time_plan": TIME_PLAN})
    assert "time_plan_error_pct" not in figures
    assert "fixed_vs_trl" not in figures
    rows = {row["figure"]: row for row in verdicts(figures)}
    assert set(rows) == set(GOALS)
    assert rows["train_prefix_n4_ratio"] == {
        "figure": "train_prefix_n4_ratio",
        "goal": ">= 1.15",
        "value": 1.15,
        "met": True,
    }
    assert (rows["fixed_vs_trl"]["value"], rows["fixed_vs_trl"]["met"]) == (None, None)
    assert rows["train_packing_longtail_ratio"]["met"] is None


def test_a_negative_goal_is_the_most_that_is_allowed() -> None:
    assert is_met(1.25, 1.25)
    assert not is_met(1.24, 1.25)
    assert is_met(180, -180)
    assert not is_met(180.1, -180)


def test_the_result_has_the_machine_of_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"command": "c", "commit": "a", "machine": {"gpu": "H200"}, "versions": {"torch": "2"}}
    (tmp_path / "h200_rows.json").write_text(json.dumps({"figures": ROWS, **common}))
    monkeypatch.setattr("sys.argv", [h200_speed.__file__, "--results", str(tmp_path)])
    h200_speed.main()
    written = json.loads((tmp_path / "h200_speed.json").read_text())
    assert written["machine"] == {"gpu": "H200"}
    assert written["figures"]["train_prefix_n4_ratio"] == 1.15
    assert list(written["sources"]) == ["h200_rows"]


def test_settings_that_are_not_shipped_stand_beside_the_figure() -> None:
    results = {
        "h200_levers_xqa": {"figures": {"opd_tok_s_256x512": 12_000.0}},
        "h200_levers": {"figures": {"opd_tok_s_256x512": 11_000.0}},
        "h200_levers_trl": {"figures": {"trl_fixed_tok_s": 5_500.0}},
        "h200_tails_packed": {"figures": {"longtail8_vs_sequential": 2.1}},
    }
    levers = with_levers(results)
    assert levers == {
        "opd_tok_s_256x512": {"h200_levers": 11_000.0, "h200_levers_xqa": 12_000.0},
        "longtail8_vs_sequential": {"h200_tails_packed": 2.1},
        "fixed_vs_trl": {"h200_levers": 2.0},
    }
    rows = {row["figure"]: row for row in verdicts({"opd_tok_s_256x512": 9_000.0}, levers)}
    assert rows["opd_tok_s_256x512"]["met"] is False
    assert rows["opd_tok_s_256x512"]["met_with_levers"] is True
    assert rows["fixed_vs_trl"]["met"] is None
    assert rows["fixed_vs_trl"]["met_with_levers"] is False
    assert "with_levers" not in rows["opd_tok_s_n4"]
    assert {name for name, row in rows.items() if "note" in row} == set(NOTES)
    assert with_levers({"h200_levers_trl": results["h200_levers_trl"]}) == {}


def test_a_goal_that_one_of_two_runs_misses_is_missed() -> None:
    results = {
        "h200_levers_xqa": {"figures": {"opd_tok_s_256x512": 12_000.0}},
        "h200_levers_n4": {"figures": {"opd_tok_s_256x512": 9_000.0, "opd_tok_s_n4": 13_000.0}},
    }
    rows = {row["figure"]: row for row in verdicts({}, with_levers(results))}
    assert len(rows["opd_tok_s_256x512"]["with_levers"]) == 2
    assert rows["opd_tok_s_256x512"]["met_with_levers"] is False
    assert rows["opd_tok_s_n4"]["met_with_levers"] is True


def test_parts_that_were_not_begun_have_no_figure_with_levers() -> None:
    begun = {"h200_levers_n4": {"figures": {"opd_tok_s_256x512": 9_000.0}}}
    assert with_levers(begun | {"h200_levers_n4_trl": {"figures": {}}}) == {
        "opd_tok_s_256x512": {"h200_levers_n4": 9_000.0}
    }
