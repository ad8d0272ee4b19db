"""The report's row per engine and rank, and their lanes in the timeline."""

from pathlib import Path
from typing import Any

from qwen3_distill.recording.trace import TRACE_FILE, Trace, read_trace
from qwen3_distill.report.fleet_section import fleet_table, member_colours
from qwen3_distill.report.time_section import idle_table
from qwen3_distill.report.timeline import draw_timeline, load_timeline


def step(number: int, *, busy_s: float, rate: float, restarts: int, lag: int) -> dict[str, Any]:
    return {
        "step": number,
        "time/step_s": 10.0,
        "time/rollout_1_s": busy_s,
        "idle/rollout_1_fraction": 1 - busy_s / 10,
        "fleet/rollout_1_tokens": 1000.0 * number,
        "fleet/rollout_1_tok_s": rate,
        "fleet/rollout_1_queue_tokens": 100.0 * number,
        "fleet/rollout_1_restarts": restarts,
        "fleet/rollout_1_lag_steps": lag,
        "time/rank_10_s": 0.0,
        "fleet/rank_10_tokens": 0.0,
        "fleet/rank_10_restarts": 0.0,
        "time/rank_2_s": 5.0,
        "fleet/rank_2_tokens": 7.0,
        "fleet/rank_2_tok_s": 20.0,
        "fleet/teachers_serving": 1.0,
    }


STEPS = [
    step(1, busy_s=2.0, rate=500.0, restarts=1, lag=0),
    step(2, busy_s=8.0, rate=100.0, restarts=2, lag=3),
    step(3, busy_s=5.0, rate=0.0, restarts=1, lag=0),  # the run was started again
]


def test_a_row_has_what_the_steps_say_together() -> None:
    rows = {row.name: row for row in fleet_table(STEPS)}
    assert list(rows) == ["rollout replica 1", "rank 2 of the learner", "rank 10 of the learner"]
    replica = rows["rollout replica 1"]
    assert replica.rate == "120 tok/s"  # 2 x 500 + 8 x 100 tokens in 15 s of work
    assert replica.busy == "50.0%"
    assert replica.queue == "200"
    assert replica.restarts == "3"  # two of one start of the run, one of the next
    assert replica.lag == "3"
    assert rows["rank 2 of the learner"].busy == "50.0%"
    idle = rows["rank 10 of the learner"]
    assert (idle.rate, idle.busy, idle.queue, idle.lag) == ("-", "0.0%", "-", "-")


def test_a_run_without_a_cluster_has_no_rows() -> None:
    assert fleet_table([{"step": 1, "time/step_s": 1.0, "tokens/trained": 5.0}]) == []


def test_engines_are_no_stages_in_the_table_of_stages() -> None:
    line = {"time/step_s": 1.0, "idle/generate_fraction": 0.5, "idle/rollout_1_fraction": 0.5}
    assert [row.name for row in idle_table([line])] == ["generate"]


def test_every_engine_has_a_lane_in_the_colour_of_its_stage(tmp_path: Path) -> None:
    members = ("rollout_0", "rollout_1", "teacher_0", "rank_0")
    with_trace = Trace(tmp_path / TRACE_FILE)
    with_trace.add_members(members)
    for member in ("rank_0", "rollout_1", "rollout_0"):  # in another order than the tracks
        with with_trace.member(member, "work"):
            pass
    with_trace.end_step(1)
    with_trace.close()
    names = [
        event["args"]["name"]
        for event in read_trace(tmp_path / TRACE_FILE)
        if event.get("name") == "thread_name"
    ]
    assert [name for name in names if name in members] == list(members)  # also an idle one
    timeline = load_timeline(tmp_path)
    assert timeline is not None
    assert list(timeline.spans) == ["rollout_0", "rollout_1", "rank_0"]
    colours = member_colours(list(timeline.spans))
    assert colours == {"rollout_0": "c1", "rollout_1": "c1", "rank_0": "c3"}
    assert "bar c3" in draw_timeline(timeline, colours).svg
