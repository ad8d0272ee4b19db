from typing import Any

import pytest

from qwen3_distill.report.time_section import idle_table, time_figure, time_table

STAGES = ("generate", "score", "train", "publish")


def line(step: int, step_s: float, seconds: dict[str, float]) -> dict[str, Any]:
    """What a step with these busy seconds logs; of ``all`` the share is what is left."""
    busy = {stage: seconds.get(stage, 0.0) for stage in STAGES}
    return {
        "step": step,
        "time/step_s": step_s,
        **{f"time/{stage}_s": s for stage, s in busy.items()},
        **{f"idle/{stage}_fraction": 1 - s / step_s for stage, s in busy.items()},
        "idle/all_fraction": max(0.0, 1 - sum(busy.values()) / step_s),
    }


APART = [
    line(1, 10.0, {"generate": 5, "score": 1, "train": 3}),
    line(2, 2.0, {"generate": 0.5, "score": 0.5, "train": 1}),
    line(3, 4.0, {"generate": 1, "score": 1, "train": 1}),
]
TOGETHER = [line(step, 10.0, {"generate": 10, "score": 4, "train": 6}) for step in (1, 2, 3)]


def test_idle_shares_weigh_steps_by_their_time() -> None:
    rows = {row.name: row for row in idle_table(APART)}
    assert list(rows) == ["generate", "score", "train", "publish", "no stage at work"]
    generate = rows["generate"]
    assert generate.whole == "59.4%"  # 16 s, of which 6.5 s busy
    assert generate.middle == "75.0%"
    assert generate.last == "75.0%"
    assert rows["no stage at work"].whole == "12.5%"  # 1 + 0 + 1 of 16 s


def test_runs_without_idle_figures_have_no_table() -> None:
    assert idle_table([]) == []
    assert idle_table([{"step": 1, "time/train_s": 1.0}]) == []
    assert idle_table([{"step": 1, "idle/train_fraction": None, "time/step_s": 1.0}]) == []
    assert idle_table([{"step": 1, "idle/train_fraction": 0.0, "time/step_s": 0.0}]) == []


def test_stages_one_after_another_are_stacked() -> None:
    figure = time_figure(APART)
    assert figure is not None
    assert figure.title == "Seconds per step"
    assert "stack c1" in figure.svg


def test_stages_side_by_side_are_not_stacked() -> None:
    figure = time_figure(TOGETHER)
    assert figure is not None
    assert figure.title == "Busy seconds per step"
    assert "stack" not in figure.svg
    assert ("muted dash", "the whole step") in figure.legend
    assert 'class="line muted dash"' in figure.svg


def test_the_totals_of_a_run_that_goes_on_have_what_is_left() -> None:
    rows = {row.name: row for row in time_table(APART, None)}
    assert rows["generate"].time == "6.50 s"
    assert rows["generate"].percent == pytest.approx(100 * 6.5 / 16, abs=0.01)
    assert rows["other"].time == "2.00 s"
    assert rows["total"].time == "16.0 s"


def test_the_totals_of_stages_side_by_side_have_no_common_bar() -> None:
    rows = {row.name: row for row in time_table(TOGETHER, None)}
    assert rows["generate"].share == "100.0%"
    assert rows["score"].share == "40.0%"
    assert all(row.percent is None for row in rows.values())
    assert rows["total"].time == "30.0 s"


def test_the_totals_of_older_metrics_add_up() -> None:
    old = [{"step": 1, "time/generate_s": 3.0, "time/train_s": 1.0}]
    rows = {row.name: row.share for row in time_table(old, None)}
    assert rows == {"generate": "75.0%", "train": "25.0%", "total": ""}


def test_the_summary_has_the_last_word() -> None:
    summary = {"wall_s": {"generate": 30.0, "other": 10.0, "total": 40.0}}
    rows = {row.name: row.share for row in time_table(APART, summary)}
    assert rows == {"generate": "75.0%", "other": "25.0%", "total": ""}
