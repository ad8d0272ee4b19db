"""The cost ledger of real runs counts what their engines did, once, also over crashes."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from qwen3_distill.config import RunConfig
from qwen3_distill.modeling import flops
from qwen3_distill.modeling.flops import causal_pairs, forward_flops, sampling_flops
from qwen3_distill.modeling.shapes import read_shape
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.recording.cost_records import CostTotals, area, read_cost
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.types import Rollout, RolloutRequest, ScoreResult, ScoringJob
from tests.pipeline.builders import (
    EVALUATION,
    FULL,
    LORA,
    TOP_K,
    raise_warning,
    read_json,
    refused,
    run_to_end,
    tiny_config,
    tiny_values,
    write_config,
)
from tests.tiny_models import TinyModels

WORK = ("tokens/", "flops/")


class Crash(BaseException):
    """Ends a run like a kill: no handler catches it."""


class Witness:
    """Writes down what a run's engines are asked and answer, beside the ledger."""

    def __init__(self, crash_at_update: int | None = None) -> None:
        self.rollouts: list[Rollout] = []
        self.jobs: list[ScoringJob] = []
        self._updates_left = crash_at_update

    def adapt(self, parts: Parts) -> Parts:
        engine: Any = _Watched(parts.engine, generate=self._generate(parts.engine.generate))
        teacher: Any = _Watched(parts.teacher, score=self._score(parts.required_teacher.score))
        learner: Any = _Watched(parts.learner, update=self._update(parts.learner.update))
        return replace(parts, engine=engine, teacher=teacher, learner=learner)

    def _generate(self, generate: Callable[..., AsyncIterator[Rollout]]) -> Callable[..., Any]:
        async def watched(requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
            async for rollout in generate(requests):
                self.rollouts.append(rollout)
                yield rollout

        return watched

    def _score(self, score: Callable[..., Any]) -> Callable[..., Any]:
        async def watched(jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
            self.jobs += jobs
            return await score(jobs)

        return watched

    def _update(self, update: Callable[..., Any]) -> Callable[..., Any]:
        async def watched(batch: Any) -> Any:
            if self._updates_left == 0:
                raise Crash
            if self._updates_left is not None:
                self._updates_left -= 1
            return await update(batch)

        return watched


class _Watched:
    def __init__(self, part: Any, **methods: Callable[..., Any]) -> None:
        self._part = part
        self.__dict__ |= methods

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def cost_of(config: RunConfig) -> CostTotals:
    totals = read_cost(config.output_path)
    assert totals is not None
    return totals


def work_of(amounts: dict[str, float]) -> dict[str, float]:
    """The amounts that do not depend on a clock, without zeros."""
    return {key: value for key, value in amounts.items() if key.startswith(WORK) and value}


def watched_run(config: RunConfig, witness: Witness) -> None:
    run(config, SilentReporter(), raise_warning, witness.adapt)


def test_tokens_and_flops_are_those_of_the_rollouts_and_jobs(
    tiny_models: TinyModels, run_dir: Path
) -> None:
    config, witness = tiny_config(tiny_models, run_dir), Witness()
    watched_run(config, witness)
    kept = cost_of(config).kept
    student, teacher = read_shape(tiny_models.student), read_shape(tiny_models.teacher)
    sampled = sum(rollout.num_tokens for rollout in witness.rollouts)
    assert kept["tokens/sampled_student"] == sampled
    prompts = {(r.rollout_id.rsplit("/", 1)[0]): r.prompt.token_ids.size for r in witness.rollouts}
    assert kept["tokens/prompt_student"] == sum(prompts.values())
    prefilled: set[str] = set()
    expected = 0
    for rollout in witness.rollouts:
        group = rollout.rollout_id.rsplit("/", 1)[0]
        expected += sampling_flops(
            student,
            prompt=rollout.prompt.token_ids.size,
            response=rollout.num_tokens,
            prefills=group not in prefilled,
        )
        prefilled.add(group)
    assert kept["flops/sample_student"] == expected
    lengths = [job.token_ids.size for job in witness.jobs]
    assert kept["tokens/scored"] == sum(lengths)
    assert kept["tokens/scored_response"] == sampled
    assert kept["flops/score"] == forward_flops(
        teacher,
        tokens=sum(lengths),
        pairs=sum(map(causal_pairs, lengths)),
        head_tokens=sampled,
    )
    assert kept["bytes/scores"] == 4 * sampled
    # The last token of a sequence is a target only.
    assert kept["tokens/trained"] == sum(length - 1 for length in lengths)
    assert kept["tokens/loss"] == sampled
    # Published before the first step and after each.
    assert kept["bytes/weights"] == (1 + config.steps) * 4 * student.num_parameters


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training.gradient_checkpointing": True, "training.chunk_tokens": 4},
        {"objective": FULL},
        {"objective": {"kind": "sampled_reverse_kl", "kl_baseline": {"kind": "full"}}},
        {"objective": {"kind": "sampled_reverse_kl", "kl_baseline": {"kind": "top_k", "k": 4}}},
        {"evaluation": EVALUATION},
        {"pipeline": {"kind": "streaming", "max_staleness_steps": 0}},
    ],
    ids=[
        "plain",
        "recomputed",
        "full",
        "full baseline",
        "top-k baseline",
        "evaluated",
        "streaming",
    ],
)
def test_a_whole_run_costs_what_the_counter_counts(
    changes: dict[str, Any],
    tiny_models: TinyModels,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a CPU the counter does not see attention.
    monkeypatch.setattr(flops, "_attention", lambda shape, pairs: 0)
    config = tiny_config(tiny_models, run_dir, changes)
    with FlopCounterMode(display=False) as counter:
        run_to_end(config)
    # The teacher pads the shorter jobs of a call, which the ledger leaves out.
    counted, found = counter.get_total_flops(), area(cost_of(config).total, "flops")
    assert found <= counted
    assert found == pytest.approx(counted, rel=0.02)


def test_adapters_train_for_less_than_all_weights(tiny_models: TinyModels, tmp_path: Path) -> None:
    found = []
    for name, tuning in (("lora", LORA), ("full", {"kind": "full"})):
        config = tiny_config(tiny_models, tmp_path / name, {"training.tuning": tuning, "steps": 1})
        run_to_end(config)
        found.append(cost_of(config).kept["flops/train"])
    assert 0.6 * found[1] < found[0] < 0.8 * found[1]


@pytest.mark.parametrize("kind", ["sequential", "streaming"])
def test_a_crash_loses_its_steps_and_counts_them_once(
    kind: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"steps": 6, "evaluation": EVALUATION}
    if kind == "streaming":
        changes["pipeline"] = {"kind": "streaming", "max_staleness_steps": 0}
    calm = tiny_config(tiny_models, tmp_path / "calm", changes)
    run_to_end(calm)
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    crashing, resumed = Witness(crash_at_update=3), Witness()
    with pytest.raises(Crash):
        watched_run(config, crashing)
    before = cost_of(config)
    watched_run(config, resumed)
    totals = cost_of(config)
    assert work_of(totals.kept) == work_of(cost_of(calm).kept)
    assert work_of(totals.evaluation) == work_of(cost_of(calm).evaluation)
    # Steps 3 and 4 were sampled after the checkpoint of step 2; only step 3 was trained on.
    assert totals.lost["tokens/sampled_student"] == sum(
        rollout.num_tokens
        for rollout in crashing.rollouts
        if rollout.rollout_id.startswith(("step-000002", "step-000003"))
    )
    calm_steps = read_jsonl(calm.output_path / "metrics.jsonl")
    assert totals.lost["tokens/trained"] == calm_steps[2]["train/input_tokens"]
    everything = sum(r.num_tokens for r in [*crashing.rollouts, *resumed.rollouts])
    assert totals.total["tokens/sampled_student"] == everything
    assert totals.total["tokens/sampled_teacher"] == before.total["tokens/sampled_teacher"]


def test_rollouts_in_flight_at_a_stop_are_lost(tiny_models: TinyModels, run_dir: Path) -> None:
    changes = {"steps": 8, "pipeline": {"kind": "streaming", "max_staleness_steps": 3}}
    config = tiny_config(tiny_models, run_dir, changes)
    crashing, resumed = Witness(crash_at_update=5), Witness()
    with pytest.raises(Crash):
        watched_run(config, crashing)
    watched_run(config, resumed)
    totals = cost_of(config)
    everything = sum(r.num_tokens for r in [*crashing.rollouts, *resumed.rollouts])
    assert totals.total["tokens/sampled_student"] == everything
    trained = sum(r["tokens/trained"] for r in read_jsonl(run_dir / "metrics.jsonl"))
    assert totals.kept["tokens/sampled_student"] == trained
    assert totals.lost["tokens/sampled_student"] == everything - trained > 0


def test_metrics_are_the_totals_so_far_and_the_summary_has_them(
    tiny_models: TinyModels, run_dir: Path
) -> None:
    changes = {
        "objective": TOP_K,
        "cost": {"devices": 2, "price_per_device_hour": 3.5, "currency": "EUR"},
        "evaluation": EVALUATION,
    }
    config = tiny_config(tiny_models, run_dir, changes)
    run_to_end(config)
    metrics = read_jsonl(run_dir / "metrics.jsonl")
    totals = cost_of(config)
    assert metrics[-1]["cost/flops"] == area(totals.kept, "flops")
    assert metrics[-1]["cost/scored_tokens"] == totals.kept["tokens/scored"]
    assert [m["cost/flops"] for m in metrics] == sorted({m["cost/flops"] for m in metrics})
    assert metrics[-1]["cost/money"] == pytest.approx(metrics[-1]["cost/device_s"] * 3.5 / 3600)
    record = read_json(run_dir / "summary.json")["cost"]
    assert record["devices"] == 2
    assert record["kept"]["tokens"]["sampled_student"] == totals.kept["tokens/sampled_student"]
    # Ids of 4 bytes and logprobs of 4 bytes for 4 candidates.
    assert record["kept"]["bytes"]["top_k"] == 32 * totals.kept["tokens/loss"]
    assert record["evaluation"]["tokens"].keys() >= {"sampled_teacher", "sampled_student"}
    assert "sampled_teacher" not in record["kept"]["tokens"]
    assert record["lost"] == {}


def test_bad_prices_are_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    for cost, words in (
        ({"price_per_device_hour": -1}, ["cost.price_per_device_hour", "0"]),
        ({"price_per_device_hour": float("nan")}, ["cost.price_per_device_hour"]),
        ({"devices": 0}, ["cost.devices"]),
        ({"currency": "$"}, ["cost.currency"]),
    ):
        values = tiny_values(tiny_models, tmp_path / "run", {"cost": cost})
        file = write_config(tmp_path / "run.yaml", values)
        refused("run", "--config", file, words=words)
    assert not (tmp_path / "run").exists()
