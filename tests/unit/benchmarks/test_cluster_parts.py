"""Layouts, log, ledger and figures of the comparison of cards."""

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.cluster_arm import StopsInTime, Strikes
from benchmarks.lib.cluster_parts import (
    Arm,
    append_log,
    done_parts,
    figures_of,
    layout,
    ledger_check,
    member_rates,
    read_log,
    role_idle,
)
from benchmarks.speed.cluster import visible_cards
from qwen3_distill.config import ClusterConfig
from qwen3_distill.config.load import load_config

ROOT = Path(__file__).parents[3]


def test_only_cards_that_may_be_used_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_cards(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-7")
    assert [visible_cards(1), visible_cards(2)] == [["3"], ["3", "GPU-7"]]
    with pytest.raises(ValueError, match="3 cards are asked for"):
        visible_cards(3)


@pytest.mark.parametrize(
    ("name", "cards", "used"),
    [("each", 2, 2), ("each", 4, 4), ("roles", 2, 2), ("roles", 4, 4), ("roles", 8, 8)],
)
def test_a_layout_takes_all_cards(name: str, cards: int, used: int) -> None:
    config = load_config(ROOT / "configs" / "h100x2.yaml", layout(name, cards))
    cluster = config.cluster
    assert isinstance(cluster, ClusterConfig)
    assert cluster.learner is not None
    found = cluster.learner.ranks
    for engines in (cluster.rollouts, cluster.teachers):
        assert engines is not None
        found += engines.replicas if engines.where == "own" else 0
    assert found == used


def test_an_arm_has_its_layout_and_then_its_own_settings() -> None:
    settings = ["each@2:seed=1", "one:seed=2", "each@2:generation.adapters=swap"]
    arm = Arm.parse("each@2", 4, settings)
    assert (arm.name, arm.cards) == ("each@2", 2)
    assert arm.overrides == (*layout("each", 2), "seed=1", "generation.adapters=swap")
    assert Arm.parse("one", 4, []).cards == 1
    other = Arm.parse("one+swap", 4, ["one+swap:seed=3", "one:seed=4"])
    assert other == Arm("one+swap", 1, ("cluster=null", "seed=3"))
    assert other.is_base
    assert not arm.is_base
    with pytest.raises(ValueError, match="no known layout"):
        Arm.parse("apart", 4, settings)


def part(arm: str, name: str, tok_s: float, **more: Any) -> dict[str, Any]:
    return {
        "arm": arm,
        "part": name,
        "cards": 1 if arm == "one" else 2,
        "overrides": ["a=1"],
        "lengths": "longtail8" if name == "longtail8" else "fixed",
        "kind": "sequential" if name == "sequential" else "streaming",
        "struck": name == "struck",
        "steps": 5,
        "tok_s": tok_s,
        "peaks_gib": [70.0, 75.0],
        "time/publish_s": 0.1,
        "time/step_s": 10.0,
        "bytes_per_step": {"all": 7.0},
        "ledger": {"lost": 0, "duplicated": 0, "rollouts": 9},
        "restarts": 0,
        "skipped_steps": 0,
        "tokens_and_seconds_of_steps": [[tok_s, 1.0]] * 5,
    } | more


def test_the_best_arm_is_compared_with_the_best_part_of_the_base() -> None:
    log = [
        part("one", "fixed", 100.0),
        part("one+swap", "fixed", 120.0, cards=1),
        part("one", "sequential", 125.0),
        part("one", "longtail8", 50.0),
        part("each", "fixed", 200.0, **{"time/publish_s": 0.25}),
        part("roles", "fixed", 150.0),
        part("each", "longtail8", 95.0),
        part(
            "each",
            "struck",
            999.0,
            ledger={"lost": 1, "duplicated": 2, "rollouts": 9},
            restarts=1,
            served_again_s=80.0,
        ),
    ]
    figures = figures_of(log)
    assert figures["speedup_fixed"] == figures["speedup_2"] == 200 / 125
    assert figures["efficiency_2"] == 0.8
    assert figures["speedup_fixed_roles"] == 150 / 125
    assert figures["speedup_longtail8"] == pytest.approx(1.9)
    assert figures["publish_pct_of_step"] == 2.5
    assert figures["peak_gib_each"] == 75.0
    assert (figures["lost"], figures["duplicated"]) == (1, 2)
    assert (figures["struck_lost"], figures["struck_restarts"]) == (1, 1)
    assert figures["struck_served_again_s"] == 80.0


def test_long_tails_are_compared_over_the_same_steps() -> None:
    base = [[10, 1.0], [10, 1.0], [40, 1.0], [40, 1.0], [40, 1.0], [900, 1.0]]
    many = [[10, 0.5], [10, 0.5], [40, 0.5], [40, 0.5], [40, 0.5]]
    log = [
        part("one", "longtail8", 1.0, tokens_and_seconds_of_steps=base, skipped_steps=2),
        part("each", "longtail8", 1.0, tokens_and_seconds_of_steps=many, skipped_steps=2),
    ]
    assert figures_of(log)["speedup_longtail8"] == pytest.approx(2.0)
    log[0]["skipped_steps"] = 3
    assert "speedup_longtail8" not in figures_of(log)  # two steps are no comparison


def test_without_the_base_nothing_is_compared() -> None:
    slow = part("roles", "fixed", 1.0, **{"time/publish_s": 5.0})
    figures = figures_of([slow, part("each", "fixed", 2.0, **{"weights/load_s": 0.5})])
    assert not any(key.startswith("speedup") for key in figures)
    assert figures["publish_pct_of_step"] == 1.0  # of the fastest
    assert figures["load_beside_s"] == 0.5


def test_a_log_has_the_last_line_of_a_part_and_refuses_other_settings(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert read_log(log) == []
    append_log(log, part("each", "fixed", 1.0))
    append_log(log, part("each", "fixed", 2.0))
    assert [found["tok_s"] for found in read_log(log)] == [2.0]
    assert done_parts(read_log(log), Arm("each", 2, ()), ["a=1"]) == {"fixed"}
    assert done_parts(read_log(log), Arm("roles", 2, ()), ["a=1"]) == set()
    with pytest.raises(ValueError, match="each:fixed with other settings"):
        done_parts(read_log(log), Arm("each", 2, ("b=2",)), ["a=1"])


def test_rollouts_that_are_nowhere_or_twice_are_counted() -> None:
    ledger = [
        {"trained": "4 5", "dropped": ""},
        {"trained": "7 5", "dropped": "9:stale"},
    ]
    # 6 is outstanding, 8 is nowhere, 5 was trained on twice, 9 is settled and outstanding.
    found = ledger_check(ledger, 4, 10, (6, 9))
    assert found == {"rollouts": 4, "lost": 1, "duplicated": 2}


def test_engines_have_rates_while_they_work_and_idle_shares() -> None:
    steps = [
        {
            "time/step_s": 10.0,
            "time/rollout_0_s": 4.0,
            "fleet/rollout_0_tokens": 9.0,
            "fleet/rollout_0_tok_s": 100.0,
            "fleet/rollout_0_queue_tokens": 5.0,
            "time/rollout_1_s": 10.0,
            "fleet/rollout_1_tokens": 9.0,
            "fleet/rollout_1_tok_s": 10.0,
        }
    ] * 2
    members = member_rates(steps)
    assert members.keys() == {"rollout_0", "rollout_1"}
    assert members["rollout_0"]["tok_s"] == 100.0
    assert members["rollout_0"]["tok_s_of_the_run"] == 40.0
    assert members["rollout_0"]["idle_fraction"] == pytest.approx(0.6)
    steps = [{**step, "time/train_s": 2.5} for step in steps]
    idle = {"generate": pytest.approx(0.3), "score": 1.0, "train": 0.75}
    assert role_idle(members, steps) == idle


def test_a_run_stops_at_the_end_of_the_time_and_after_a_replica_is_back() -> None:
    class Recorder:
        stop_requested = False

    class Fleet:
        awaited = ""

        def __init__(self) -> None:
            self.state = self
            self.num_restarts = 0
            self.replicas = [self]
            self.host = self
            self.kills = 0

        def kill(self) -> None:
            self.kills += 1

    late: Any = StopsInTime(100, ends=0.0)
    late.recorder = Recorder()
    late.step(1, {})
    assert late.recorder.stop_requested

    fleet: Any = Fleet()
    strikes: Any = Strikes(10, 100, time.time() + 60, fleet)
    strikes.recorder = Recorder()
    for step in (11, 12, 13):
        strikes.step(step, {})
    assert fleet.kills == 1
    fleet.num_restarts, fleet.awaited = 1, "rollout replica 1 (starting)"
    strikes.step(14, {})
    assert strikes.served_again_s is None
    fleet.awaited = ""
    for step in (15, 16):
        strikes.step(step, {})
    assert strikes.served_again_s is not None
    assert not strikes.recorder.stop_requested
    strikes.step(17, {})
    assert strikes.recorder.stop_requested
    assert fleet.kills == 1
