"""Every amount is in the cost ledger once, kept or lost, whatever a process died of."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.config import CostConfig
from qwen3_distill.errors import DataError
from qwen3_distill.recording.clock import StepClock
from qwen3_distill.recording.cost_ledger import PART_INTERVAL_S, CostLedger
from qwen3_distill.recording.cost_records import CostTotals, area, fold, read_cost

FLOPS = "flops/train"


class FakeTime:
    """A clock that a test sets, and the stages' clock on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.clock = StepClock(0.0)

    def __call__(self) -> float:
        return self.now

    def shares(self) -> Mapping[str, float]:
        return self.clock.shares(self.now)

    def work(self, stage: str, seconds: float) -> None:
        self.clock.enter(stage, self.now)
        self.now += seconds
        self.clock.leave(stage, self.now)


def opened(folder: Path, time: FakeTime, *, step: int, **config: object) -> CostLedger:
    """A process that begins to train from a step, and held its devices for 5 s before."""
    ledger = CostLedger(
        folder / "cost.jsonl",
        CostConfig.model_validate(config),
        began=time.now,
        unknown={},
        now=time,
    )
    time.now += 5.0
    time.clock = StepClock(time.now)
    ledger.begin(step, time.shares)
    return ledger


def read(folder: Path, *, with_points: bool = False) -> CostTotals:
    totals = read_cost(folder, with_points=with_points)
    assert totals is not None
    return totals


def test_steps_after_the_checkpoint_are_lost_and_counted_once(tmp_path: Path) -> None:
    time = FakeTime()
    killed = opened(tmp_path, time, step=0)
    for step in (1, 2, 3):
        killed.add({FLOPS: 10**step})
        killed.end_step(step, ())
    resumed = opened(tmp_path, time, step=1)
    assert resumed.totals.kept[FLOPS] == 10
    assert resumed.totals.lost[FLOPS] == 1100
    for step in (2, 3):
        resumed.add({FLOPS: 10**step})
        resumed.end_step(step, ())
    resumed.close()
    totals = read(tmp_path)
    assert totals.kept[FLOPS] == 1110
    assert totals.lost[FLOPS] == 1100
    assert totals.total[FLOPS] == 2210
    assert totals.starts == 2


def test_totals_of_the_process_are_those_of_the_file(tmp_path: Path) -> None:
    time = FakeTime()
    for start in (0, 1, 1):
        ledger = opened(tmp_path, time, step=start, price_per_device_hour=2.0)
        for step in (start + 1, start + 2):
            ledger.add({FLOPS: step})
            ledger.add({FLOPS: 7}, evaluates=True)
            time.work("train", 2.0)
            ledger.end_step(step, ())
            time.work("evaluate", 1.0)
            ledger.write("evaluation")
        found = read(tmp_path)
        assert found.kept == pytest.approx(ledger.totals.kept)
        assert found.evaluation == pytest.approx(ledger.totals.evaluation)
        assert found.lost == pytest.approx(ledger.totals.lost)


def test_a_step_that_was_not_finished_is_lost(tmp_path: Path) -> None:
    time = FakeTime()
    killed = opened(tmp_path, time, step=0)
    killed.add({FLOPS: 1})
    killed.end_step(1, ())
    killed.add({FLOPS: 20})
    killed.close()
    opened(tmp_path, time, step=1)
    totals = read(tmp_path)
    assert (totals.kept[FLOPS], totals.lost[FLOPS]) == (1, 20)


def test_work_of_a_long_step_is_on_disk_before_the_step_ends(tmp_path: Path) -> None:
    time = FakeTime()
    killed = opened(tmp_path, time, step=0)
    killed.add({FLOPS: 1})
    time.now += PART_INTERVAL_S
    killed.add({FLOPS: 2})  # then it is killed
    assert read(tmp_path).kept[FLOPS] == 3
    opened(tmp_path, time, step=0)
    totals = read(tmp_path)
    assert FLOPS not in totals.kept
    assert totals.lost[FLOPS] == 3
    assert totals.total["device_s/idle"] == pytest.approx(PART_INTERVAL_S)


def test_rollouts_that_no_step_used_are_lost_with_their_process(tmp_path: Path) -> None:
    time = FakeTime()
    killed = opened(tmp_path, time, step=0)
    for name, flops in (("trained", 1), ("dropped", 20), ("waiting", 300)):
        killed.add({FLOPS: flops}, rollout_id=name)
        killed.add({FLOPS: flops}, rollout_id=name)  # its score
    killed.end_step(1, {"waiting"})
    opened(tmp_path, time, step=1)
    totals = read(tmp_path)
    assert totals.kept[FLOPS] == 42
    assert totals.lost[FLOPS] == 600


def test_evaluations_are_apart_and_stay_with_their_step(tmp_path: Path) -> None:
    time = FakeTime()
    ledger = opened(tmp_path, time, step=0)
    ledger.add({FLOPS: 1})
    ledger.end_step(1, ())
    ledger.add({FLOPS: 20}, evaluates=True)
    time.work("evaluate", 3.0)
    ledger.write("evaluation")
    opened(tmp_path, time, step=1)
    totals = read(tmp_path)
    assert (totals.kept[FLOPS], totals.evaluation[FLOPS]) == (1, 20)
    assert totals.evaluation["device_s/evaluate"] == 3.0
    assert FLOPS not in totals.lost
    assert totals.marginal[FLOPS] == 1
    opened(tmp_path, time, step=0)  # its checkpoint was corrupt
    assert read(tmp_path).lost[FLOPS] == 21


def test_roles_add_up_to_what_was_held_also_where_stages_overlap(tmp_path: Path) -> None:
    time = FakeTime()
    ledger = opened(tmp_path, time, step=0, devices=2, price_per_device_hour=1800.0)
    time.clock.enter("generate", time.now)
    time.now += 4.0
    time.work("train", 6.0)
    time.clock.leave("generate", time.now)
    time.now += 1.0
    ledger.end_step(1, ())
    totals = read(tmp_path)
    assert totals.kept["device_s/generate"] == pytest.approx(2 * (4.0 + 3.0))
    assert totals.kept["device_s/train"] == pytest.approx(2 * 3.0)
    assert totals.kept["device_s/idle"] == pytest.approx(2 * 1.0)
    assert totals.kept["device_s/start"] == pytest.approx(2 * 5.0)
    assert area(totals.total, "device_s") == pytest.approx(2 * time.now)
    assert area(totals.total, "money/USD") == pytest.approx(time.now)
    assert totals.marginal.keys() >= {"device_s/generate", "money/USD/train"}
    assert not totals.marginal.keys() & {"device_s/idle", "device_s/start", "money/USD/idle"}


def test_every_start_counts_at_its_own_price(tmp_path: Path) -> None:
    time = FakeTime()
    for step, price in ((0, 3600.0), (1, 7200.0)):
        ledger = opened(tmp_path, time, step=step, price_per_device_hour=price)
        time.work("train", 1.0)
        ledger.end_step(step + 1, ())
        ledger.close()
    assert read(tmp_path).kept["money/USD/train"] == pytest.approx(1.0 + 2.0)


def test_points_hold_the_cost_before_the_evaluation_of_their_step(tmp_path: Path) -> None:
    time = FakeTime()
    ledger = opened(tmp_path, time, step=0)
    for step in (1, 2):
        ledger.add({FLOPS: 10})
        ledger.end_step(step, ())
        ledger.add({FLOPS: 1000}, evaluates=True)
        ledger.write("evaluation")
    ledger.add({FLOPS: 5})
    ledger.close()
    resumed = opened(tmp_path, time, step=2)
    resumed.add({FLOPS: 10})
    resumed.end_step(3, ())
    points = read(tmp_path, with_points=True).points
    assert [point.step for point in points] == [0, 1, 2, 3]
    assert [point.marginal["flops"] for point in points] == [0, 10, 20, 30]
    assert [point.total["flops"] for point in points] == [0, 10, 1020, 2035]


@pytest.mark.parametrize("odd", ["text", [["a", 1]], {"device_s/train": "1"}, {"a": True}, None])
@pytest.mark.parametrize("key", ["work", "evaluation", "unused"])
def test_amounts_of_another_form_are_refused(key: str, odd: object) -> None:
    start = {
        **{"step": 0, "kind": "start", "devices": 1, "unknown": {}, "work": {}, "evaluation": {}},
        **{"unused": {}, "price_per_device_hour": None, "currency": "USD"},
    }
    fold([start])
    with pytest.raises(DataError, match=rf"not a cost ledger.*{key} is no object of numbers"):
        fold([start | {key: odd}])


def test_no_ledger_and_a_damaged_one_are_told_apart(tmp_path: Path) -> None:
    assert read_cost(tmp_path) is None
    (tmp_path / "cost.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(DataError, match="not a cost ledger"):
        read_cost(tmp_path)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5), st.booleans()), max_size=5))
def test_whatever_is_lost_the_kept_steps_are_those_of_an_undisturbed_run(
    tmp_path_factory: pytest.TempPathFactory, lives: list[tuple[int, int, bool]]
) -> None:
    """Each life trains some steps, goes back by some, and may die within a step."""
    folder, time = tmp_path_factory.mktemp("lives"), FakeTime()
    step, spent, last = 0, 0, 0
    for steps, back, dies_within in [*lives, (1, 0, False)]:
        ledger = opened(folder, time, step=step)
        for _ in range(steps):
            step += 1
            ledger.add({FLOPS: 10**3 + step})
            spent += 10**3 + step
            ledger.end_step(step, ())
        if dies_within:
            ledger.add({FLOPS: 7})
            spent += 7
            ledger.close()
        last, step = step, max(0, step - back)
    totals = read(folder)
    assert totals.total[FLOPS] == spent
    assert totals.kept[FLOPS] == sum(10**3 + number for number in range(1, last + 1))
