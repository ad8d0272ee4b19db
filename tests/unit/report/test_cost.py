"""What runs cost to an accuracy, in the report and on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.recording.cost_records import read_cost
from qwen3_distill.report.cost_reach import reached, read_run_cost
from qwen3_distill.report.cost_table import cost_rows, reach_text, si
from qwen3_distill.report.report import write_report
from tests.pipeline.builders import call_cli, refused

ACCURACIES = {0: 0.2, 2: 0.4, 4: 0.3, 6: 0.8}
TEACHER = 1.0


def write_run(folder: Path, *, accuracies: dict[int, float] | None = None) -> Path:
    """A run folder of six steps that cost 100 FLOPs, 2 s and 6 EUR each.

    Its first process was killed in step 3, which had cost 50 FLOPs.
    """
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    start = {"work": {"device_s/start": 1.0}, "evaluation": {}, "unused": {}, "devices": 1}
    start |= {"price_per_device_hour": 10_800.0, "currency": "EUR", "unknown": {}}
    lines: list[dict[str, Any]] = [{"step": 0, "kind": "start", **start}]
    lines += [step_line(1), step_line(2), line("part", 3, {"flops/train": 50})]
    lines += [{"step": 2, "kind": "start", **start}, *map(step_line, (3, 4, 5, 6))]
    write_lines(folder / "cost.jsonl", lines)
    measured = ACCURACIES if accuracies is None else accuracies
    records = [evaluation("student", step, value) for step, value in measured.items()]
    write_lines(folder / "evaluations.jsonl", [evaluation("teacher", 0, TEACHER), *records])
    return folder


def step_line(step: int) -> dict[str, Any]:
    return line("step", step, {"flops/train": 100, "device_s/train": 2.0, "tokens/trained": 7})


def line(kind: str, step: int, work: dict[str, float]) -> dict[str, Any]:
    return {"step": step, "kind": kind, "work": work, "evaluation": {}, "unused": {}}


def evaluation(model: str, step: int, accuracy: float) -> dict[str, Any]:
    numbers = {"ci_low": accuracy, "ci_high": accuracy, "num_problems": 10}
    return {"step": step, "model": model, "accuracy": accuracy, **numbers}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_level_between_two_evaluations_is_interpolated_in_cost(tmp_path: Path) -> None:
    run = read_run_cost(write_run(tmp_path / "run"))
    half = reached(run, 0.5, absolute=False)  # of the gap from 0.2 to 1.0
    assert half.accuracy == pytest.approx(0.6)
    # 0.6 lies three fifths of the way from 0.3 at step 4 to 0.8 at step 6.
    assert half.step == pytest.approx(5.2)
    assert half.marginal["flops"] == pytest.approx(520)
    assert half.marginal["device_s"] == pytest.approx(10.4)
    assert half.total["flops"] == pytest.approx(570)
    assert half.total["device_s"] == pytest.approx(12.4)
    assert half.total["money_EUR"] == pytest.approx(3 * 12.4)


def test_the_first_crossing_counts_although_accuracy_falls_again(tmp_path: Path) -> None:
    run = read_run_cost(write_run(tmp_path / "run"))
    found = reached(run, 0.4, absolute=True)
    assert (found.step, found.marginal["flops"]) == (2, 200)
    assert reached(run, 0.1, absolute=True).marginal["flops"] == 0


def test_a_level_that_was_not_reached_is_a_bound_and_no_extrapolation(tmp_path: Path) -> None:
    run = read_run_cost(write_run(tmp_path / "run"))
    found = reached(run, 0.95, absolute=False)
    assert found.step is None
    assert found.marginal["flops"] == 600
    assert reach_text(found).startswith("not reached within 600 FLOP, 12.0 s, 36.00 EUR")
    assert found.record()["reached"] is False
    assert found.record()["not_within_total"]["flops"] == 650


@pytest.mark.parametrize(
    ("accuracies", "why"),
    [
        ({}, "the student was not evaluated"),
        ({2: 0.4}, "no evaluation before training"),
        ({0: 1.0, 2: 1.0}, "the teacher is no better"),
    ],
)
def test_a_run_that_cannot_tell_says_why(
    accuracies: dict[int, float], why: str, tmp_path: Path
) -> None:
    run = read_run_cost(write_run(tmp_path / "run", accuracies=accuracies))
    found = reached(run, 0.5, absolute=False)
    assert found.step is None
    assert found.why_not is not None
    assert why in found.why_not
    assert "within" not in reach_text(found)


def test_runs_stand_side_by_side_and_one_without_a_ledger_is_named(tmp_path: Path) -> None:
    new, old = write_run(tmp_path / "new"), write_run(tmp_path / "old")
    (old / "cost.jsonl").unlink()
    result = call_cli("cost", new, old, "--reach", "0.5,0.95")
    assert result.code == 0
    assert "old: no cost ledger" in result.err
    for words in ("650", "600", "50% of the gap", "not reached", "straight line"):
        assert words in result.out, result.out
    record = json.loads(call_cli("cost", new, old, "--reach", "0.5", "--json").out)
    first, second = record["runs"]
    assert first["cost"]["lost"] == {"flops": {"train": 50}}
    assert first["reach"][0]["marginal"]["flops"] == pytest.approx(520)
    assert second["cost"] is None
    assert second["reach"][0]["why_not"] == "no cost ledger"


def test_bad_input_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    refused("cost", tmp_path / "absent", words=["absent", "not a run folder"])
    for levels in ("0", "1.5", "half", "0.5,,", "nan"):
        result = call_cli("cost", run, "--reach", levels)
        assert result.code == 2
        assert "is no level" in " ".join(result.err.split())
    (run / "cost.jsonl").write_text('{"step": 1}\n')
    refused("cost", run, words=["cost.jsonl", "not a cost ledger"])


def test_the_report_has_the_table_and_the_curve(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = write_report(run, []).read_text()
    for words in ("Held-out accuracy against cost", "50% of the gap", "lost to crashes", "650"):
        assert words in page
    (run / "cost.jsonl").unlink()
    assert "older than the cost ledger" in write_report(run, []).read_text()


def test_amounts_by_tag_have_a_row_each_whatever_a_changed_ledger_says(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    work = {"by_tag/my_math_scored_tokens": 5.0, "by_tag/code_sampled_tokens": 3.0}
    work |= {"by_tag/odd": 2.0}
    lines = [json.loads(text) for text in (folder / "cost.jsonl").read_text().splitlines()]
    write_lines(folder / "cost.jsonl", [*lines, line("step", 7, work)])
    rows = cost_rows([read_cost(folder)])
    found = {row.name: row.values for row in rows if row.group == "tokens by tag"}
    assert found == {
        "sampled of code": ["3"],
        "scored, prompts included, of my_math": ["5"],
        "amount of odd": ["2"],
    }


def test_every_role_that_was_held_for_has_a_row_and_the_rows_add_up(tmp_path: Path) -> None:
    totals = read_run_cost(write_run(tmp_path / "run")).totals
    rows = {row.name: row.values[0] for row in cost_rows([totals])}
    assert rows["train"] == "12.0 s"
    assert rows["start-up"] == "2.00 s"
    assert [row.values[0] for row in cost_rows([totals]) if row.is_sum] == ["650", "14.0 s"]
    assert (si(1.5e18, "FLOP"), si(512, "B"), si(0)) == ("1.5 EFLOP", "512 B", "0")
