"""Tokens per second of a fleet's engines, from totals and busy seconds."""

from qwen3_distill.recording.clock import StepClock
from qwen3_distill.recording.fleet_rates import FleetRates
from qwen3_distill.recording.trace import Trace


def test_a_rate_is_the_step_s_tokens_by_the_step_s_work() -> None:
    rates = FleetRates({"fleet/rollout_0_tokens": 100.0})
    first = {"fleet/rollout_0_tokens": 400.0, "time/rollout_0_s": 3.0}
    assert rates.of_step(first) == {"fleet/rollout_0_tok_s": 100.0}
    second = {"fleet/rollout_0_tokens": 600.0, "time/rollout_0_s": 4.0}
    assert rates.of_step(second) == {"fleet/rollout_0_tok_s": 50.0}


def test_an_engine_without_work_has_no_rate_and_queues_are_no_totals() -> None:
    rates = FleetRates({})
    values = {
        "fleet/teacher_1_tokens": 8.0,
        "time/teacher_1_s": 0.0,
        "fleet/teacher_0_queue_tokens": 50.0,
        "time/teacher_0_queue_s": 1.0,
        "fleet/rank_10_tokens": 30.0,
        "time/rank_10_s": 2.0,
        "tokens/trained": 5.0,
    }
    assert rates.of_step(values) == {"fleet/rank_10_tok_s": 15.0}


def test_a_fleet_s_engine_takes_no_share_of_the_stages_time() -> None:
    """Its work is its stage's: counted twice, the cost of the stages would be divided wrongly."""
    clock = StepClock(0)
    clock.add_member("rollout_1")
    clock.enter("generate", 0)
    clock.enter_member("rollout_0", 0)
    clock.enter("train", 2)
    clock.leave("train", 4)
    clock.leave_member("rollout_0", 4)
    clock.leave("generate", 4)
    clock.enter_member("rollout_0", 6)
    assert clock.shares(8) == {"generate": 3.0, "train": 1.0, "idle": 4.0}
    times = clock.take_step(8)
    assert times.any_busy_s == 4.0
    assert times.busy_s["rollout_0"] == 6.0
    assert times.busy_s["rollout_1"] == 0.0
    assert times.idle_fractions["rollout_0"] == 0.25
    assert times.idle_fractions["rollout_1"] == 1.0
    assert times.idle_fractions["all"] == 0.5


def test_the_trace_counts_an_engine_s_span_as_no_stage() -> None:
    moments = iter([0.0, 1.0, 2.0, 3.0, 5.0, 6.0])
    trace = Trace(now=lambda: next(moments))
    with trace.member("rollout_0", "4 rollouts"):  # from 1 to 2
        pass
    assert trace.shares() == {"idle": 3.0}
    assert trace.end_step(1).busy_s["rollout_0"] == 1.0
