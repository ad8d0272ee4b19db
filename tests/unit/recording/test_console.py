import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qwen3_distill.recording.console import (
    LiveReporter,
    PlainReporter,
    SilentReporter,
    make_reporter,
)
from qwen3_distill.recording.text import clock, duration, gib, gibibytes, number, quantity


class _Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock_() -> _Clock:
    return _Clock()


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


def _plain(out: io.StringIO, now: _Clock, total: int = 120, start: int = 0) -> PlainReporter:
    return PlainReporter(total, start, Console(file=out, force_terminal=False), now)


def _values(kl: float | None = 0.031, **more: float | None) -> dict[str, float | None]:
    return {
        "loss/reverse_kl_nats": kl,
        "time/generate_s": 0.3,
        "time/score_s": 0.1,
        "time/train_s": 0.09,
        "time/publish_s": 0.01,
        "time/evaluate_s": 40.0,  # now and then: no part of a step's time
        "tokens/generated": 1000,
        **more,
    }


def _evaluation(model: str = "student", accuracy: float = 0.81, step: int = 0) -> dict[str, Any]:
    return {
        "step": step,
        "model": model,
        "accuracy": accuracy,
        "ci_low": accuracy - 0.03,
        "ci_high": accuracy + 0.03,
        "num_problems": 500,
        "samples_per_problem": 1,
        "wall_s": 9.1,
    }


SUMMARY: dict[str, Any] = {
    "accuracy": {
        "before": {"value": 0.48, "ci_low": 0.44, "ci_high": 0.52},
        "after": {"value": 0.81, "ci_low": 0.77, "ci_high": 0.84},
        "teacher": None,
    },
    "steps": 120,
    "tokens": {"generated": 216_000, "scored": 216_000, "trained": 216_000},
    "wall_s": {"generate": 40.0, "train": 60.0, "total": 100.0},
}


def test_sizes_are_in_gib() -> None:
    assert (gib(7945689498), gibibytes(7945689498)) == ("7.4", "7.4 GiB")
    assert gibibytes(3 << 28, digits=2) == "0.75 GiB"


def test_a_step_line_says_where_the_run_stands(out, clock_):
    reporter = _plain(out, clock_)
    reporter.evaluation(_evaluation())
    for step in (1, 2):
        clock_.time += 6.0
        reporter.step(step, _values())
    assert out.getvalue().splitlines()[-1] == (
        # 6.5 s for two steps so far, the first one counted by its stages: 118 more take 6:24
        "step   2/120  kl 0.031  acc 81.0% at step 0  2,000 tok/s  0.50 s/step  ETA 6:24"
    )


def test_an_accuracy_of_the_step_itself_is_not_dated(out, clock_):
    reporter = _plain(out, clock_)
    reporter.evaluation(_evaluation(step=2))
    clock_.time += 6.0
    reporter.step(2, _values())
    assert "acc 81.0%  " in out.getvalue().splitlines()[-1]


def test_stages_that_overlap_take_no_longer_than_the_step(out, clock_):
    _plain(out, clock_).step(1, _values(**{"time/step_s": 0.4}))
    assert "2,500 tok/s  0.40 s/step" in out.getvalue()


@pytest.mark.parametrize("start", [0, 90], ids=["not_told", "told"])
def test_the_eta_of_a_resumed_run_counts_only_its_own_steps(out, clock_, start):
    reporter = _plain(out, clock_, total=100, start=start)
    reporter.step(91, _values())
    assert out.getvalue().endswith("ETA 0:04\n")  # 9 steps of 0.5 s


def test_training_accuracy_stands_in_until_there_is_a_held_out_one(out, clock_):
    reporter = _plain(out, clock_)
    reporter.step(1, _values(**{"rollout/accuracy": 0.5}))
    assert "rollout acc 50.0%" in out.getvalue()
    reporter.evaluation(_evaluation("student", 0.81))
    reporter.evaluation(_evaluation("teacher", 0.94))
    clock_.time += 10
    reporter.step(2, _values(**{"rollout/accuracy": 0.6}))
    last = out.getvalue().splitlines()[-1]
    assert "  acc 81.0%" in last
    assert "rollout acc" not in last


@pytest.mark.parametrize("live", [False, True])
def test_a_note_stays(out, clock_, live):
    console = Console(file=out, force_terminal=live, width=80)
    reporter = (LiveReporter if live else PlainReporter)(120, 0, console, clock_)
    reporter.step(1, _values())
    reporter.note("all [4] rollouts were cut")
    reporter.close()
    assert "note: all [4] rollouts were cut" in out.getvalue()
    SilentReporter().note("nothing")


def test_missing_numbers_are_left_out(out, clock_):
    _plain(out, clock_).step(1, {"loss/reverse_kl_nats": None})
    assert out.getvalue().rstrip() == "step   1/120  ETA 0:00"


def test_lines_come_at_an_interval_and_always_first_and_last(out, clock_):
    reporter = _plain(out, clock_, total=1000)
    for step in range(1, 1001):
        clock_.time += 0.5
        reporter.step(step, _values())
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step    1/1000")
    assert lines[1].startswith("step   11/1000")
    assert lines[-1].startswith("step 1000/1000")
    assert 20 < len(lines) < 70


def test_a_counting_stage_is_not_repeated_at_once(out, clock_):
    reporter = _plain(out, clock_)
    reporter.stage("loading the student")
    for done in range(0, 500, 20):
        clock_.time += 1.0
        reporter.stage(f"evaluating {done}/500")
    reporter.stage("handshake")
    lines = out.getvalue().splitlines()
    assert lines[0] == "loading the student"
    assert lines[1] == "evaluating 0/500"
    assert lines[2] == "evaluating 100/500"
    assert lines[-1] == "handshake"
    assert len(lines) == 7


def test_plain_output_has_no_control_sequences_and_keeps_brackets(out, clock_):
    reporter = _plain(out, clock_)
    reporter.stage("loading [bold]models/x[/bold] " + "y" * 200)
    reporter.evaluation(_evaluation(step=25))
    assert "\x1b" not in out.getvalue()
    first, second = out.getvalue().splitlines()  # nothing was wrapped
    assert first.startswith("loading [bold]models/x[/bold] y")
    assert second == "evaluation: student at step 25  81.0% [78.0, 84.0]  500 problems  9.10 s"


def test_the_end_shows_accuracy_time_and_the_report(out, clock_):
    with _plain(out, clock_) as reporter:
        reporter.finish(SUMMARY, Path("runs/demo/report.html"))
    text = out.getvalue()
    assert "student before" in text
    assert "44.0 to 52.0%" in text
    assert "student after" in text
    assert "teacher" not in text  # it was not measured
    assert "40.0%" in text  # share of generate
    assert "1 min 40 s" in text
    assert "120 steps; tokens: 216 k generated, 216 k scored, 216 k trained" in text
    assert text.endswith("report: runs/demo/report.html\n")


@pytest.mark.parametrize("is_written", [True, False])
def test_the_end_says_where_the_student_is(out, clock_, tmp_path, is_written):
    if is_written:
        (tmp_path / "student").mkdir()
    with _plain(out, clock_) as reporter:
        reporter.finish(SUMMARY, tmp_path / "report.html")
    assert (f"student: {tmp_path / 'student'}" in out.getvalue()) == is_written


def test_a_run_without_evaluation_has_no_accuracy_table(out, clock_):
    for nothing in (None, {"before": None, "after": None, "teacher": None}):
        _plain(out, clock_).finish({**SUMMARY, "accuracy": nothing}, None)
    assert "held-out" not in out.getvalue()
    assert "report:" not in out.getvalue()


@pytest.mark.parametrize("beside", [False, True])
def test_stages_that_add_up_to_more_than_the_total_are_explained(out, clock_, beside):
    wall_s = {"generate": 6.0, "train": 6.0 if beside else 4.0, "total": 10.0}
    _plain(out, clock_).finish({**SUMMARY, "wall_s": wall_s}, None)
    assert ("stages ran side by side" in out.getvalue()) == beside


def test_a_terminal_gets_the_live_display_and_a_pipe_does_not(out):
    terminal = Console(file=out, force_terminal=True, _environ={"TERM": "xterm"})
    assert isinstance(make_reporter(3, console=terminal), LiveReporter)
    assert isinstance(
        make_reporter(3, console=Console(file=out, force_terminal=False)), PlainReporter
    )


def test_the_live_display_fits_on_80_columns_and_gives_the_terminal_back(out, clock_):
    terminal = Console(
        file=out, force_terminal=True, width=80, legacy_windows=False, _environ={"TERM": "xterm"}
    )
    with LiveReporter(120, 0, terminal, clock_) as reporter:
        reporter.stage("loading")
        reporter.evaluation(_evaluation())
        reporter.step(40, _values())
        reporter.finish(SUMMARY, None)
    text = out.getvalue()
    assert "loading" in text
    assert "step  40/120" in text
    assert "ETA" in text
    assert "…" not in text  # nothing was cut
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back


def test_the_silent_reporter_has_the_same_methods():
    with SilentReporter() as reporter:
        reporter.stage("x")
        reporter.step(1, _values())
        reporter.evaluation(_evaluation())
        reporter.finish(SUMMARY, None)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (clock(0), "0:00"),
        (clock(59.6), "1:00"),
        (clock(3725), "1:02:05"),
        (duration(0.0421), "0.04 s"),
        (duration(59.96), "1 min 00 s"),
        (duration(3725), "1 h 02 min"),
        (duration(3599.9), "1 h 00 min"),
        (quantity(9_999), "9,999"),
        (quantity(999_950), "1000 k"),
        (quantity(1_234_567), "1.23 M"),
        (number(0), "0"),
        (number(1.00024), "1.0002"),
        (number(2.5e-6), "2.5e-06"),
        (number(123456), "123,456"),
    ],
)
def test_numbers_read_well(shown, expected):
    assert shown == expected


def test_an_evaluation_at_the_second_temperature_says_so(out, clock_):
    reporter = _plain(out, clock_)
    reporter.evaluation(_evaluation("student@0", 0.5) | {"temperature": 0.0})
    reporter.evaluation(_evaluation("teacher@0.3", 0.9) | {"temperature": 0.3})
    shown = out.getvalue()
    assert "evaluation: student at step 0, greedy  50.0%" in shown
    assert "evaluation: teacher, temperature 0.3  90.0%" in shown


def test_the_summary_has_a_row_per_temperature(out, clock_):
    second = {"temperature": 0.0, **SUMMARY["accuracy"]}
    _plain(out, clock_).finish({**SUMMARY, "second_accuracy": second}, None)
    shown = out.getvalue()
    assert "student before " in shown
    assert "student before, greedy" in shown
