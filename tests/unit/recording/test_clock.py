"""The times of steps, from moments that are handed in."""

import pytest

from qwen3_distill.recording.clock import StepClock
from qwen3_distill.recording.jsonl import combine


def test_overlapping_spans_of_a_stage_are_counted_once() -> None:
    clock = StepClock(0)
    clock.enter("generate", 0)
    clock.enter("generate", 2)
    clock.enter("score", 2)
    assert clock.busy_seconds("generate", 5) == pytest.approx(5)
    clock.leave("score", 5)
    clock.leave("generate", 5)
    clock.leave("generate", 6)
    times = clock.take_step(8)
    assert times.busy_s["generate"] == pytest.approx(6)
    assert times.busy_s["score"] == pytest.approx(3)
    assert times.any_busy_s == pytest.approx(6)
    assert times.idle_fractions["all"] == pytest.approx(2 / 8)


def test_a_span_open_at_the_end_of_a_step_belongs_to_both_steps() -> None:
    clock = StepClock(0)
    clock.enter("generate", 1)
    assert clock.take_step(4).busy_s["generate"] == pytest.approx(3)
    assert clock.step_began == 4
    clock.leave("generate", 6)
    second = clock.take_step(12)
    assert second.wall_s == pytest.approx(8)
    assert second.busy_s["generate"] == pytest.approx(2)
    assert clock.busy_seconds("generate", 12) == pytest.approx(5)


def test_a_counter_s_mean_is_over_time_and_begins_anew_with_every_step() -> None:
    clock = StepClock(0)
    clock.count("waiting", 8, 0)
    clock.count("waiting", 8, 1)  # the same value again changes nothing
    clock.count("waiting", 2, 3)
    assert clock.take_step(4).counters == {"waiting": pytest.approx((6.5, 8))}
    second = combine(clock.take_step(8).metrics())
    assert second["queue/waiting_mean"] == second["queue/waiting_max"] == 2


def test_a_step_of_no_time_is_not_a_division_by_zero() -> None:
    clock = StepClock(7)
    clock.count("waiting", 3, 7)
    times = clock.take_step(7)
    assert set(times.idle_fractions.values()) == {0.0}
    assert times.counters == {"waiting": (3, 3)}
