"""Lengths that rollouts are given, and steps that may be compared."""

import argparse
import math

import numpy as np
import pytest

from benchmarks.lib.overlap_parts import (
    Lengths,
    Plan,
    Variant,
    means_of_steps,
    rate_of_common_steps,
)


def test_a_long_tail_has_the_median_and_the_99th_percentile_that_its_name_says() -> None:
    lengths = Lengths("longtail8", median_tokens=256, max_tokens=1 << 20)
    drawn = [lengths.of(f"step-{n // 256}/{n % 256}") for n in range(20_000)]
    assert np.median(drawn) == pytest.approx(256, rel=0.03)
    assert np.quantile(drawn, 0.99) == pytest.approx(8 * 256, rel=0.08)


def test_every_run_draws_the_same_lengths_wherever_it_begins() -> None:
    first, later = (Lengths("longtail16", 256, 4096, first_step=n) for n in (0, 40))
    ours = [first.of(f"step-{step}/{n}") for step in range(3) for n in range(50)]
    assert ours == [later.of(f"step-{step + 40}/{n}") for step in range(3) for n in range(50)]
    assert max(ours) <= 4096
    assert len(set(ours)) > 100


def test_a_plan_skips_three_streaming_steps_unless_it_says_otherwise() -> None:
    assert Plan.parse("fixed:2:6,longtail8:3:22:10") == [
        Plan("fixed", 2, 6, skip=3),
        Plan("longtail8", 3, 22, skip=10),
    ]


def test_a_variant_may_not_change_what_the_engines_were_started_with() -> None:
    assert Variant.parse("fixed:8:pause_at_ready_steps=1") == [
        Variant("fixed", 8, "pause_at_ready_steps=1")
    ]
    with pytest.raises(argparse.ArgumentTypeError, match="--other-mps"):
        Variant.parse("fixed:8:mps=false")


def run_of(steps: list[tuple[int, float]], skipped: int) -> dict[str, object]:
    return {"tokens_and_seconds_of_steps": steps, "skipped_steps": skipped}


def test_only_steps_that_count_in_both_are_compared() -> None:
    long = run_of([(1, 1.0), (1, 1.0), (40, 2.0), (30, 1.0), (30, 2.0), (900, 1.0)], skipped=1)
    short = run_of([(500, 1.0), (500, 1.0), (50, 10.0), (25, 5.0), (25, 5.0)], skipped=2)
    ratio = rate_of_common_steps(long, short)
    assert ratio is not None
    assert math.isclose(ratio, (100 / 5) / (100 / 20))


@pytest.mark.parametrize(("skipped", "is_enough"), [(0, True), (1, False), (9, False)])
def test_with_fewer_than_three_common_steps_there_is_no_ratio(
    skipped: int, is_enough: bool
) -> None:
    three, many = run_of([(1, 1.0)] * 3, 0), run_of([(1, 1.0)] * 9, skipped)
    assert (rate_of_common_steps(three, many) is not None) == is_enough


def test_what_some_steps_have_has_its_mean_over_them() -> None:
    gap = "health/learner_vs_engine_abs_nats"
    steps = [
        {"time/step_s": 2.0, "tokens": 9, gap: 0.5},
        {"time/step_s": 4.0, "weights/load_s": 0.5, gap: 0.25},
    ]
    assert means_of_steps(steps) == {"time/step_s": 3.0, "weights/load_s": 0.5, gap: 0.375}
    assert means_of_steps(steps[:1]) == {"time/step_s": 2.0, gap: 0.5}


def test_shares_and_queues_are_means_over_time() -> None:
    steps = [
        {"time/step_s": 1.0, "idle/train_fraction": 0.0, "queue/ready_mean": 8.0},
        {"time/step_s": 3.0, "idle/train_fraction": 0.8, "queue/ready_mean": 0.0},
    ]
    found = means_of_steps(
        [{**step, "queue/ready_max": 4.0 * step["time/step_s"]} for step in steps]
    )
    assert found["idle/train_fraction"] == pytest.approx(0.6)
    assert found["queue/ready_mean"] == pytest.approx(2.0)
    assert found["queue/ready_max"] == 8.0
