"""The rules of docs/evidence/protocol.md that are code: costs, ratios, rates and the page."""

import os
import time
from pathlib import Path

import pytest

from benchmarks.evidence import analyse, page
from benchmarks.evidence.analyse import Reached, ratio_of, reached
from benchmarks.evidence.arms import ARMS, LEARNING_RATES, arm_sections, tuned_name
from benchmarks.evidence.run import (
    chosen_rates,
    config_values,
    curve_of,
    jobs_of,
    trial_jobs,
    workers,
)
from benchmarks.evidence.settings import EVALUATION_STEPS, GPU, HELDOUT, SETTINGS
from qwen3_distill.errors import DataError
from qwen3_distill.modeling.shapes import ModelShape

CURVE = [
    {"step": 4, "greedy": 0.5, "cost": 100.0},
    {"step": 8, "greedy": 0.7, "cost": 200.0},
    {"step": 14, "greedy": 0.6, "cost": 350.0},
    {"step": 22, "greedy": 0.9, "cost": 550.0},
]


def cost(point: analyse.Point) -> float:
    return float(point["cost"])


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0.4, Reached(cost=0.0, within=True)),  # the student has it before
        (0.45, Reached(cost=50.0, within=True)),  # half-way to the first evaluation
        (0.6, Reached(cost=150.0, within=True)),  # a later fall does not undo it
        (0.8, Reached(cost=350 + 200 * 2 / 3, within=True)),
        (0.95, Reached(cost=550.0, within=False)),  # the budget, never an extrapolation
    ],
)
def test_a_cost_is_interpolated_to_the_first_evaluation_at_the_level(
    level: float, expected: Reached
) -> None:
    found = reached(CURVE, 0.4, level, "greedy", cost)
    assert found.within == expected.within
    assert found.cost == pytest.approx(expected.cost)


def models(student: float, teacher: float) -> dict[str, object]:
    def measured(accuracy: float) -> dict[str, object]:
        each = {"accuracy": accuracy, "mean_tokens": 100.0, "tokens_per_s": 50.0}
        return {"temperature_0": each, "temperature_1": each}

    shape = vars(GPU.student)
    rows = {
        "student": measured(student),
        "teacher": measured(teacher),
        "warm_start": {"samples": 1000, "steps": 100},
    }
    return {"settings": {"chain": rows}, "sizes": {"student": shape, "teacher": vars(GPU.teacher)}}


def point(greedy: float, student: float, teacher: float) -> dict[str, object]:
    """A point after ``student`` and ``teacher`` sampled tokens, 10 FLOPs each."""
    return {
        "greedy": greedy,
        "sampled": greedy,
        "flops": {"sample_student": 10 * student, "sample_teacher": 10 * teacher, "train": 100.0},
        "tokens": {"sampled_student": student, "sampled_teacher": teacher, "trained": 40.0},
        "device_s": {"generate": 8.0, "score": 1.0, "train": 2.0, "publish": 5.0},
    }


def test_each_accounting_counts_what_the_protocol_says() -> None:
    of = analyse.accountings(models(0.4, 0.9), "chain")
    mixed = point(0.9, student=30.0, teacher=10.0)
    assert of["flops"].cost(mixed) == 500
    assert of["flops_data_given"].cost(mixed) == 400
    # Three quarters of the sampling time are the student's; the teacher's is at its best rate.
    assert of["device_s"].cost(mixed) == pytest.approx(1 + 2 + 6 + 10 / 50)
    assert of["projected_4b_from_32b_s"].cost(mixed) > of["projected_4b_from_8b_s"].cost(mixed)
    records = [{"curve": [mixed]}]
    plain, warm = (
        analyse.costs_of(records, models(0.4, 0.9), "chain", "greedy", 50, of[name])[0]
        for name in ("flops", "flops_with_warm_start")
    )
    assert plain.cost == pytest.approx(250)
    assert warm.cost == pytest.approx(250 + of["flops_with_warm_start"].fixed)
    assert of["flops_with_warm_start"].fixed > 1e12


def test_without_a_gap_nothing_is_reached() -> None:
    with pytest.raises(DataError, match="no gap to close"):
        analyse.level_of(models(0.9, 0.9), "chain", "greedy", 50)


def seeds(*costs: float, within: bool = True) -> list[Reached]:
    return [Reached(cost=value, within=within) for value in costs]


def test_a_ratio_is_of_means_with_an_interval_around_it() -> None:
    ratio = ratio_of(seeds(20, 22, 18, 21, 19), seeds(10, 11, 9, 10, 10))
    assert ratio is not None
    assert ratio.value == pytest.approx(2.0)
    assert 1.8 < ratio.low < 2.0 < ratio.high < 2.2
    assert ratio.bound == 0


def test_a_budget_that_was_not_enough_makes_the_ratio_a_bound() -> None:
    above, below = seeds(20, 20), seeds(10, 10)
    missed = [Reached(cost=20, within=True), Reached(cost=20, within=False)]
    of_missed_sft, of_missed_opd = ratio_of(missed, below), ratio_of(above, missed)
    assert of_missed_sft is not None
    assert of_missed_opd is not None
    assert (of_missed_sft.bound, of_missed_opd.bound) == (1, -1)
    assert ratio_of(missed, missed) is None


def test_the_slowdown_of_the_teacher_gives_the_claimed_ratio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = models(0.4, 0.9)
    runs = {
        "sft_hard": [{"curve": [point(0.9, student=0.0, teacher=40.0)]}],
        "opd_topk16": [{"curve": [point(0.9, student=30.0, teacher=0.0)]}],
    }
    slowdown = analyse.slowdowns_of(runs, known, "chain")["4b_from_8b"]
    rates = dict(analyse.stage_rates("4b_from_8b"))

    def seconds(arm: str, rate: float) -> float:
        monkeypatch.setattr(
            "benchmarks.evidence.projection.stage_rates",
            lambda pair: rates | {"sample_teacher": rate},
        )
        accounting = analyse.accountings(known, "chain")["projected_4b_from_8b_s"]
        return analyse.costs_of(runs[arm], known, "chain", "greedy", 50, accounting)[0].cost

    slower = rates["sample_teacher"] / slowdown
    assert seconds("sft_hard", slower) / seconds("opd_topk16", slower) == pytest.approx(90)
    del runs["opd_topk16"]
    assert analyse.slowdowns_of(runs, known, "chain") == {}


def test_ratios_within_a_side_are_of_flops_alone() -> None:
    known = models(0.4, 0.9)
    runs = {
        arm: [{"curve": [point(0.9, student=tokens, teacher=0.0)]}] * 2
        for arm, tokens in {"opd_sampled": 50.0, "opd_topk16": 20.0}.items()
    }
    rows = [r for r in analyse.ratios_of(runs, known, "chain") if r["kind"] == "sampled_to_topk16"]
    assert {row["accounting"] for row in rows} == {"flops"}
    assert {row["value"] for row in rows if row["decoding"] == "greedy"} == {2.0}
    figures = analyse.figures_of({}, {"chain": rows})
    assert figures["chain_ratio_sampled_to_topk16_80"] == pytest.approx(2.0)


def test_a_tables_cell_says_what_is_a_bound() -> None:
    row = {"value": 1.5, "low": 1.2, "high": 1.8, "bound": 1, "seeds": 5}
    assert page.ratio(row) == "> 1.50 (1.20 to 1.80)"
    assert page.ratio(row | {"bound": -1, "seeds": 1}) == "< 1.50"
    assert page.ratio(None) == "-"
    arm = {"greedy_flops_to_80": 1.234e13, "greedy_flops_to_80_reached": 5, "seeds": 5}
    assert page.cost(arm, "greedy_flops_to_80") == "1.2e13"
    missed = arm | {"greedy_flops_to_80_reached": 2}
    assert page.cost(missed, "greedy_flops_to_80") == "> 1.2e13 (2 of 5)"


def test_the_cheapest_arm_is_one_that_reached_the_level() -> None:
    costs = {
        "sft_hard": seeds(30, 30),
        "sft_soft": seeds(10, 10, within=False),
        "opd_sampled": seeds(9, 9),
        "opd_topk16": seeds(8, 8),
    }
    assert analyse._cheapest(costs) == ("sft_hard", "opd_topk16")


def test_every_arm_with_a_rate_of_its_own_has_the_same_trials() -> None:
    jobs = trial_jobs(list(SETTINGS), list(ARMS), {"steps": 1})
    own = [arm for arm in ARMS if tuned_name(arm) == arm]
    assert len(jobs) == len(SETTINGS) * len(own) * len(LEARNING_RATES)
    counted = jobs_of(list(SETTINGS), list(ARMS), range(5), {})
    assert {job[2] for job in jobs.values()}.isdisjoint({job[2] for job in counted.values()})


def test_workers_are_dealt_to_the_gpus_in_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    # A task ends when the other has begun too: so none has both.
    seen, go = tmp_path / "seen", tmp_path / "go"
    script = f"echo $CUDA_VISIBLE_DEVICES >> {seen}; until [ -e {go} ]; do sleep 0.1; done"
    with workers(2) as pool:
        running = [pool.submit(os.system, script) for _ in range(2)]
        while not (seen.exists() and len(seen.read_text().split()) == 2):
            assert not any(task.done() for task in running)
            time.sleep(0.1)
        go.touch()
    assert sorted(seen.read_text().split()) == ["4", "7"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7"


def test_the_best_trial_chooses_the_rate() -> None:
    def trial(rate: float, greedy: float, sampled: float) -> dict[str, object]:
        curve = [{"greedy": 1.0, "sampled": 1.0}, {"greedy": greedy, "sampled": sampled}]
        return {"setting": "chain", "arm": "grpo", "learning_rate": rate, "curve": curve}

    trials = [trial(3e-4, 0.5, 0.5), trial(1e-3, 0.9, 0.2), trial(3e-3, 0.8, 0.1)]
    assert chosen_rates(trials) == {("chain", "grpo"): 1e-3}


def test_arms_differ_from_the_reference_in_their_sections_alone() -> None:
    sizes = {
        "models": "m",
        "device": "cpu",
        "batching": "static",
        "steps": 100,
        "learning_rate": 1e-3,
        "problems": HELDOUT,
        "first_problem": 0,
        "at_steps": EVALUATION_STEPS,
    }
    reference = config_values("chain", "opd_topk16", 0, sizes, "out")
    arm_keys = {"objective", "rollouts", "pipeline", "prompts_per_step", "samples_per_prompt"}
    for name, arm in ARMS.items():
        values = config_values("chain", name, 0, sizes, "out")
        differing = {k for k in values.keys() | reference if values.get(k) != reference.get(k)}
        allowed = arm_keys if arm.teacher == "teacher" else {*arm_keys, "scoring"}
        assert differing <= allowed, name
        rollouts = values["prompts_per_step"] * values["samples_per_prompt"]
        assert rollouts == SETTINGS["chain"].rollouts_per_step


def test_an_arm_of_epochs_collects_a_part_of_the_steps() -> None:
    sections = arm_sections(ARMS["offline_opd"], steps=100, rollouts_per_step=128, max_new=100)
    assert sections["pipeline"] == {"kind": "offline", "collect_steps": 20}


def test_a_curve_joins_both_decodings_with_the_cost_up_to_the_step() -> None:
    def line(kind: str, step: int, flops: float) -> dict[str, object]:
        return {
            "kind": kind,
            "step": step,
            "devices": 1,
            "unknown": {},
            "price_per_device_hour": None,
            "currency": "USD",
            "work": {"flops/train": flops, "device_s/train": 1.0, "device_s/idle": 9.0},
            "evaluation": {"flops/sample_student": 1e9},
            "unused": {},
        }

    ledger = [line("start", 0, 0.0), line("step", 1, 5.0), line("step", 2, 7.0)]

    def evaluation(step: int, accuracy: float, **more: float) -> dict[str, object]:
        fields = {"mean_tokens": 9.0, "truncated_fraction": 0.1, "num_problems": 8}
        return {"step": step, "model": "student", "accuracy": accuracy, **fields, **more}

    evaluations = [evaluation(1, 0.2), evaluation(1, 0.3, temperature=0.0), evaluation(2, 0.6)]
    first, second = curve_of(evaluations, ledger)
    assert (first["sampled"], first["greedy"]) == (0.2, 0.3)
    assert first["flops"] == {"train": 5.0}
    assert second["flops"] == {"train": 12.0}
    assert second["device_s"] == {"train": 3.0}  # the start's second too; idle time is left out


def test_sizes_are_those_of_the_protocol() -> None:
    def parameters(shape: object) -> int:
        values = vars(shape)
        return ModelShape(
            name="lab",
            vocab_size=264,
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["layers"],
            num_heads=values["heads"],
            num_kv_heads=values["kv_heads"],
            head_dim=32,
            tied=values["tied"],
            context_length=1024,
        ).num_parameters

    assert 10e6 <= parameters(GPU.teacher) <= 50e6
    assert 2e6 <= parameters(GPU.student) <= 10e6
    assert HELDOUT >= 4000
    assert len(ARMS) >= 10


def test_the_page_replaces_the_figures_of_one_setting() -> None:
    text = (
        "a\n<!-- figures of chain -->\nold\n<!-- end -->\n<!-- figures of short -->\n<!-- end -->"
    )
    result = page.replaced(text, "chain", "new")
    assert "old" not in result
    assert result.index("new") < result.index("<!-- figures of short -->")
    with pytest.raises(SystemExit, match="lacks the marks"):
        page.replaced(text, "multiply", "new")
