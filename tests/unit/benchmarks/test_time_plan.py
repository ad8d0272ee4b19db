"""The time plan's benchmark: its six configs are planned, and new results become rows."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.lib.common import RESULTS
from benchmarks.lib.time_plan_gb10 import gb10_head_costs, gb10_training
from benchmarks.lib.time_plan_rows import (
    RATIOS,
    committed_rows,
    measured_rows,
    shared_prompt_gains,
)
from benchmarks.speed.time_plan import SETTINGS, _steps, compare, error_figures
from qwen3_distill.planning.calibration import Calibration
from qwen3_distill.planning.peaks import named_device
from qwen3_distill.planning.rates import calibrated_rates, peak_rates


def test_six_configs_differ_from_one_another_and_from_what_fitted() -> None:
    assert len({setting.name for setting in SETTINGS}) == 6
    times = [round(setting.case.plan().step_s, 3) for setting in SETTINGS]
    assert len(set(times)) == 6
    fitted = [row.case for row in committed_rows() if row.fits]
    assert all(setting.case not in fitted for setting in SETTINGS)
    for setting in SETTINGS:
        assert setting.case.config().rollouts_per_step == setting.sequences


def test_measured_steps_become_rows_with_their_errors() -> None:
    setting = SETTINGS[0]
    plan = setting.case.plan()
    stages = {
        "generate": 2 * plan.stages["sampling"].seconds,
        "score": 2 * plan.stages["scoring"].seconds,
        "train": 2 * plan.stages["training"].seconds,
        "publish": 2 * plan.stages["publishing"].seconds,
    }
    parts = {setting.name: {"case": asdict(setting.case), "steps": [stages]}}
    rows = measured_rows(parts)
    assert len(rows) == 5
    figures = error_figures(rows)
    assert figures["time_plan_steps"] == 1
    assert figures["time_plan_stages"] == 4
    assert figures["time_plan_error_pct"] == pytest.approx(50)
    assert figures["time_plan_stage_error_pct"] == pytest.approx(50)


def test_settings_are_measured_with_the_objective_that_is_predicted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmarks.speed.time_plan.subprocess.run", run)
    arguments = argparse.Namespace(name="measured", models=Path("models"), overrides=[])
    with pytest.raises(SystemExit, match="not measured"):
        _steps(SETTINGS[0], arguments)
    given = [part for part in commands[0] if part.startswith("objective=")]
    assert given == [f"objective={SETTINGS[0].case.objective}"]


def test_rows_have_the_objective_that_was_measured_and_whole_steps_their_host() -> None:
    rows = committed_rows()
    assert {row.source for row in rows} >= {
        "h200_start",
        "h200_one_start",
        "h200_tails",
        "h200_tails_packed",
        "h200_levers",
        "h200_levers_without",
        "h200_rows",
    }
    for row in rows:
        dense = "top 16" in row.name or "top16" in row.name
        assert (row.case.config().objective.kind == "top_k") == dense, row.name
    whole = [row for row in rows if row.what == "step" and "sequential" in row.name]
    assert len(whole) >= 10
    for row in whole:
        plan = row.case.plan()
        assert row.predicted_s() == pytest.approx(sum(t.seconds for t in plan.stages.values()))


def test_the_host_is_held_against_a_run_that_did_not_fit_it() -> None:
    hosts = {row.name: row for row in committed_rows() if row.what == "host"}
    assert hosts["warm_start_s step 2"].fits == "host_s_per_rollout"
    other = hosts["cold_start_s step 2"]
    assert other.fits is None
    assert other.changed is None
    assert abs(other.error()) < 0.2
    # The step of the run that fitted it is counted without it.
    steps = {row.name: row.what for row in committed_rows() if row.source == "h200_start"}
    assert steps["warm_start_s step 2"] == "step without host"
    assert steps["cold_start_s step 2"] == "step"


def test_ratios_of_learners_are_fitted_by_the_rows_that_they_name() -> None:
    assert set(RATIOS) == {
        "train_own_attention",
        "train_packed_rows",
        "train_fp8_backward",
        "train_candidates",
    }
    gains = shared_prompt_gains()
    short, long = gains["128x512_n4"], gains["300x508_n4"]
    assert short["predicted"] == pytest.approx(short["measured"], rel=2e-3)  # it fitted
    assert long["predicted"] == pytest.approx(long["measured"], rel=0.055)  # it did not
    assert short["by_tokens"] > 1.05 * short["measured"]
    assert long["by_tokens"] > 1.01 * long["measured"]


def test_the_committed_result_is_what_the_plan_predicts_now() -> None:
    figures, details = compare()
    committed = json.loads((RESULTS / "time_plan.json").read_text())
    assert committed["figures"] == pytest.approx(figures)
    for part in ("held_out", "fitted", "gb10", "gb10_predicted", "gb10_training"):
        assert committed[part] == json.loads(json.dumps(details[part])), part


def test_the_float32_head_of_a_gb10_is_predicted_with_tf32_and_without() -> None:
    costs = gb10_head_costs()
    for teacher in ("32b", "8b"):
        without, with_tf32 = (
            costs[f"gb10_predicted_{name}_head_{teacher}_pct"] for name in ("float32", "tf32")
        )
        assert 0 < with_tf32 < without
    assert not gb10_training()["held_out"]
    assert "1,690 MHz" in str(gb10_training()["why"])


def test_an_h200_as_it_was_calibrated_has_the_rates_that_the_shares_were_fitted_to() -> None:
    found = json.loads((RESULTS / "h200_calibration.json").read_text())["calibration"]
    assert found.pop("schema") == 1
    measured, table = (
        asdict(rates)
        for rates in (
            calibrated_rates(Calibration(**found)),
            peak_rates(named_device("h200")),
        )
    )
    for said in ("name", "origin", "calibrated"):
        assert measured.pop(said) != table.pop(said)
    assert measured == pytest.approx(table, rel=1e-3)
