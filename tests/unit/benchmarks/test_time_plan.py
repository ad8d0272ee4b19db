"""The time plan's benchmark: its six configs are planned, and new results become rows."""

from dataclasses import asdict

import pytest

from benchmarks.lib.time_plan_rows import committed_rows
from benchmarks.speed.time_plan import SETTINGS, error_figures, measured_rows


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
    rows = measured_rows(parts, "h200")
    assert len(rows) == 5
    figures = error_figures(rows)
    assert figures["time_plan_steps"] == 1
    assert figures["time_plan_stages"] == 4
    assert figures["time_plan_error_pct"] == pytest.approx(50)
    assert figures["time_plan_stage_error_pct"] == pytest.approx(50)
