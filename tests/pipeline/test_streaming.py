"""The streaming loop: equal to the sequential one at staleness 0; no rollout is lost or reused."""

import asyncio
import itertools
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.errors import ConfigError, EngineError, StallError
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.ready import whole_prompts
from qwen3_distill.pipeline.requests import is_full_length
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.recording.trace import read_trace
from qwen3_distill.types import (
    Batch,
    FinishReason,
    Rollout,
    RolloutRequest,
    ScoreFailure,
    ScoreResult,
    ScoringJob,
)
from tests.pipeline.builders import (
    EVALUATION,
    LORA,
    TASK_REWARD,
    TOP_K,
    RecordingReporter,
    Values,
    raise_warning,
    run_to_end,
    slowed,
    student_bytes,
    timeless,
    tiny_config,
)
from tests.tiny_models import TinyModels

ALONE = {"scoring.batch_tokens": 1}
"""Every rollout is scored by itself: a teacher's batch does not show in the last bits."""

STALL_S = 3.0
"""A hang is found in time, and a busy machine is not taken for one."""


def streaming(**settings: Any) -> Values:
    return {"pipeline": {"kind": "streaming", **settings}}


@dataclass
class Ledger:
    """The rollouts that a run folder's ledger lists as trained on and dropped."""

    trained: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, config: RunConfig) -> "Ledger":
        records = read_jsonl(config.output_path / "ledger.jsonl")
        return cls(
            [entry for record in records for entry in record["trained"].split()],
            [entry for record in records for entry in record["dropped"].split()],
        )

    @property
    def trained_numbers(self) -> list[int]:
        return [int(entry) for entry in self.trained]


def metric(config: RunConfig, key: str) -> list[Any]:
    return [record[key] for record in read_jsonl(config.output_path / "metrics.jsonl")]


# --- As the sequential loop ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"training.tuning": LORA}, TASK_REWARD, {"objective": TOP_K}],
    ids=["full", "lora", "task_reward", "top_k"],
)
def test_one_batch_in_flight_and_staleness_0_give_the_sequential_result_bit_for_bit(
    tiny_models: TinyModels, tmp_path: Path, changes: Values
) -> None:
    common = {**ALONE, "evaluation": EVALUATION, **changes}
    plain = tiny_config(tiny_models, tmp_path / "sequential", common)
    streamed = tiny_config(
        tiny_models,
        tmp_path / "streaming",
        {**common, **streaming(max_staleness_steps=0, max_in_flight=4)},
    )
    run_to_end(plain)
    run_to_end(streamed)
    assert student_bytes(plain.output_path) == student_bytes(streamed.output_path)
    for name in ("evaluations.jsonl", "ledger.jsonl"):
        assert timeless(plain.output_path / name) == timeless(streamed.output_path / name)
    for one, other in zip(
        timeless(plain.output_path / "metrics.jsonl"),
        timeless(streamed.output_path / "metrics.jsonl"),
        strict=True,
    ):
        assert one == {key: other[key] for key in one}


# --- What streaming may and may not do -----------------------------------------------------------


def test_every_rollout_is_trained_on_once_and_none_is_older_than_allowed(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = tiny_config(
        tiny_models, tmp_path / "run", {"steps": 12, **streaming(max_staleness_steps=2)}
    )
    seen = Batches()
    run_streaming(config, seen.watch)
    ledger = Ledger.of(config)
    assert sorted(ledger.trained_numbers) == list(range(12 * 4))
    assert not ledger.dropped
    assert [len(batch.scored) for batch in seen.batches] == [4] * 12
    ages = [
        batch.lag_steps(version) for version, batch in zip(seen.steps, seen.batches, strict=True)
    ]
    assert max(ages) <= 2
    assert max(ages) > 0  # it does run ahead
    assert max(metric(config, "weights/lag_steps")) == max(ages)


def test_running_rollouts_go_on_with_new_weights_and_name_both(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    changes = {"steps": 8, "sampling.max_new_tokens": 30, **streaming(max_staleness_steps=4)}
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    seen = Batches()
    run_streaming(config, lambda parts: seen.watch(ragged(parts)))
    spans = [len(item.rollout.versions) for batch in seen.batches for item in batch.scored]
    assert max(spans) > 1


def test_at_boundaries_no_rollout_sees_two_versions(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    changes = {
        "steps": 8,
        "sampling.max_new_tokens": 30,
        **streaming(max_staleness_steps=4, weight_updates="boundary"),
    }
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    seen = Batches()
    run_streaming(config, lambda parts: seen.watch(ragged(parts)))
    rollouts = [item.rollout for batch in seen.batches for item in batch.scored]
    assert {len(rollout.versions) for rollout in rollouts} == {1}
    assert sorted(Ledger.of(config).trained_numbers) == list(range(8 * 4))


def test_what_is_too_old_is_dropped_and_counted(tiny_models: TinyModels, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_models, tmp_path / "run", {"steps": 8, **streaming(max_staleness_steps=1)}
    )
    run_streaming(config, lambda parts: replace(parts, engine=HoldsBack(parts.engine, {2}, 16)))
    ledger = Ledger.of(config)
    assert ledger.dropped == ["2:stale"]
    assert sum(metric(config, "staleness/dropped_rollouts")) == 1
    assert sum(metric(config, "tokens/dropped")) > 0
    counts = Counter(ledger.trained_numbers)
    assert set(counts.values()) == {1}
    assert 2 not in counts
    # Every step had its four; one place is no room for the two samples of another prompt.
    trained = [len(r["trained"].split()) for r in read_jsonl(config.output_path / "ledger.jsonl")]
    assert trained == [4] * 7 + [3]
    assert max(metric(config, "weights/lag_steps")) <= 1


@pytest.mark.parametrize("ahead", [1, 3])
def test_generation_runs_only_so_far_ahead_and_what_is_slow_may_be_older(
    tiny_models: TinyModels, tmp_path: Path, ahead: int
) -> None:
    config = tiny_config(
        tiny_models,
        tmp_path / "run",
        {
            "steps": 9,
            "generation.max_sequences": 64,
            **streaming(max_staleness_steps=8, max_steps_ahead=ahead),
        },
    )
    begun = list[tuple[int, int]]()
    seen = Batches()

    def adapt(parts: Parts) -> Parts:
        slow = HoldsBack(parts.engine, {2}, 30)
        return seen.watch(replace(parts, engine=CountsBegun(slow, parts.learner, begun)))

    run_streaming(config, adapt)
    ledger = Ledger.of(config)
    assert sorted(ledger.trained_numbers) == list(range(9 * 4))  # the slow one was not dropped
    ages = sorted(
        version.step - item.rollout.versions[0].version.step
        for version, batch in zip(seen.steps, seen.batches, strict=True)
        for item in batch.scored
    )
    assert ages[-1] > ahead
    assert ages[-2] <= ahead
    # A step's window is full at its begin, and never more than full.
    assert max(total - 4 * step for step, total in begun) == 4 * (ahead + 1)


@pytest.mark.parametrize("steps", [1, 2, None])
def test_decoding_pauses_while_the_learner_is_behind_and_goes_on_with_every_rollout(
    tiny_models: TinyModels, tmp_path: Path, steps: int | None
) -> None:
    """The learner's step here lasts until decoding pauses, or until nothing more can begin."""
    config = tiny_config(
        tiny_models,
        tmp_path / "run",
        {
            "steps": 8,
            "sampling.max_new_tokens": 30,
            "generation.max_sequences": 64,
            **streaming(max_staleness_steps=8, max_steps_ahead=3, pause_at_ready_steps=steps),
        },
    )
    behind = WaitsForPause()
    run_streaming(config, behind.watch)
    assert sorted(Ledger.of(config).trained_numbers) == list(range(8 * 4))
    assert behind.pauses == behind.resumes
    assert behind.decoded_while_paused == 0
    if steps is None:
        assert behind.pauses == 0
    else:
        assert behind.pauses >= 3
        assert min(behind.ended_at_pause) >= 4 * steps
        assert max(behind.left_at_pause) > 0


def test_a_prompts_samples_share_a_step_when_they_are_compared_with_one_another(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    changes = {"steps": 8, **TASK_REWARD, **streaming(max_staleness_steps=2)}
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    # Of the first twelve it comes last: when the second step's rollouts are there.
    run_streaming(config, lambda parts: replace(parts, engine=HoldsBack(parts.engine, {3}, 12)))
    for record in read_jsonl(config.output_path / "ledger.jsonl"):
        numbers = [int(entry) for entry in record["trained"].split()]
        prompts = Counter(number // 2 for number in numbers)
        assert set(prompts.values()) == {2}, numbers


# --- Trace --------------------------------------------------------------------------------------


def test_trace_and_metrics_show_stages_side_by_side_and_every_queue(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    changes = {"steps": 6, **streaming(max_staleness_steps=2, max_in_flight=5)}
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    run_streaming(config, slowed("update", 0.5))  # the others get as far on a busy machine
    events = read_trace(config.output_path / "trace.json")
    counters = {event["name"] for event in events if event["ph"] == "C"}
    assert counters == {"in_flight", "unscored", "ready"}
    assert {e["cat"] for e in events if e["ph"] == "B"} >= {"generate", "score", "train", "publish"}
    records = read_jsonl(config.output_path / "metrics.jsonl")
    assert 0 < max(record["queue/in_flight_max"] for record in records) <= 5
    assert max(record["queue/ready_max"] for record in records) > 4  # more than the step's own
    stages = ("generate", "score", "train", "publish")
    beside = [
        sum(record[f"time/{stage}_s"] for stage in stages)
        - record["time/step_s"] * (1 - record["idle/all_fraction"])
        for record in records
    ]
    assert max(beside) > 0.01  # seconds in which two stages ran


# --- Interruptions ------------------------------------------------------------------------------


class Stop(Exception):
    """A crash."""


@pytest.mark.parametrize("crash_after", [1, 3, 4, 7])
def test_a_run_that_crashed_goes_on_and_loses_or_repeats_no_rollout(
    tiny_models: TinyModels, tmp_path: Path, crash_after: int
) -> None:
    changes = {"steps": 10, **streaming(max_staleness_steps=2)}
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    crashing = Batches(crash_after=crash_after)
    with pytest.raises(Stop):
        run_streaming(config, crashing.watch)
    run_streaming(config, lambda parts: parts)
    ledger = Ledger.of(config)
    assert sorted(ledger.trained_numbers) == list(range(10 * 4))
    assert not ledger.dropped


def test_a_run_that_is_stopped_saves_its_step_and_goes_on(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    changes = {"steps": 6, "checkpoint.every_steps": 100, **streaming(max_staleness_steps=2)}
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    seen = Batches(interrupt_after=3)
    assert run(config, RecordingReporter(), raise_warning, seen.watch) is None
    assert len(read_jsonl(config.output_path / "metrics.jsonl")) == 3
    run_streaming(config, lambda parts: parts)
    assert sorted(Ledger.of(config).trained_numbers) == list(range(6 * 4))


def test_an_engine_that_hangs_ends_the_run_with_what_it_waited_for(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    changes = {"steps": 4, **streaming(max_staleness_steps=1, stall_timeout_s=STALL_S)}
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    message = r"nothing moved for .*: 1 rollouts are being sampled.* of 4 are ready"
    with pytest.raises(StallError, match=message):
        run_streaming(config, lambda parts: replace(parts, engine=HoldsBack(parts.engine, {5}, 99)))


def test_a_teacher_that_hangs_ends_the_run_with_what_it_waited_for(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    changes = {"steps": 4, **streaming(max_staleness_steps=1, stall_timeout_s=STALL_S)}
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    with pytest.raises(StallError, match=r"the teacher's scores of .* rollouts"):
        run_streaming(
            config, lambda parts: replace(parts, teacher=HangingTeacher(parts.required_teacher))
        )


@pytest.mark.parametrize(
    ("part", "method", "message"),
    [
        ("learner", "update", "the learner's step"),
        ("engine", "load", "the engine to serve the new weights"),
        ("engine", "prefixes", "what runs, for a harvest"),
    ],
)
def test_a_call_that_hangs_ends_the_run_with_what_it_waited_for(
    tiny_models: TinyModels, tmp_path: Path, part: str, method: str, message: str
) -> None:
    settings = {"harvest": {"deadline_s": 0.001, "min_tokens": 1}} if method == "prefixes" else {}
    changes = {"steps": 4, **streaming(stall_timeout_s=STALL_S, **settings)}
    config = tiny_config(tiny_models, tmp_path / "run", changes)

    def hanging(parts: Parts) -> Parts:
        return replace(parts, **{part: Hangs(getattr(parts, part), method)})

    with pytest.raises(StallError, match=rf"waited 3 s for {message} \(pipeline.stall_timeout_s"):
        run_streaming(config, hanging)


@pytest.mark.parametrize("part", ["engine", "teacher"])
def test_an_error_of_a_stage_ends_the_run_with_that_error(
    tiny_models: TinyModels, tmp_path: Path, part: str
) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", {"steps": 6, **streaming()})
    broken = {"engine": FailingEngine, "teacher": FailingTeacher}[part]
    with pytest.raises(EngineError, match=f"the {part} is broken"):
        run_streaming(config, lambda parts: replace(parts, **{part: broken(getattr(parts, part))}))


def test_rollouts_without_a_score_are_dropped_and_too_many_of_them_are_an_error(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", {"steps": 6, **streaming()})
    with pytest.raises(EngineError, match=r"1 rollouts got no score .*more than the 0"):
        run_streaming(
            config, lambda parts: replace(parts, teacher=Unscored(parts.required_teacher, {9}))
        )


# --- Pieces -------------------------------------------------------------------------------------


def test_harvested_pieces_and_remainders_hold_every_token_once(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    harvest = {"deadline_s": 1e-6, "min_tokens": 3, "full_length_fraction": 0.25}
    changes = {
        "steps": 30,
        "sampling.max_new_tokens": 24,
        **streaming(max_staleness_steps=40, max_in_flight=6, harvest=harvest),
    }
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    seen, tap = Batches(), Tap()
    run_streaming(config, lambda parts: seen.watch(tap.watch(ragged(parts))))
    pieces: dict[str, list[Rollout]] = {}
    for batch in seen.batches:
        for item in batch.scored:
            pieces.setdefault(item.rollout.rollout_id.partition("/from-")[0], []).append(
                item.rollout
            )
    for parts in pieces.values():
        parts.sort(key=lambda piece: piece.continues_at)
    in_parts = [parts for parts in pieces.values() if len(parts) > 1]
    assert any(parts[-1].finish_reason is not FinishReason.HARVESTED for parts in in_parts)
    whole_and_in_parts = 0
    for rollout_id, parts in pieces.items():
        edges = np.cumsum([0, *(piece.num_tokens for piece in parts)])
        assert [piece.continues_at for piece in parts] == edges[:-1].tolist()
        if rollout_id in tap.finished and parts[-1].finish_reason is not FinishReason.HARVESTED:
            ids = np.concatenate([piece.response_ids for piece in parts])
            assert ids.tolist() == tap.finished[rollout_id].response_ids.tolist()
            whole_and_in_parts += len(parts) > 1
    assert whole_and_in_parts
    kept_whole = {number for number in range(400) if is_full_length(config.seed, number, 0.25)}
    in_pieces = {int(e.partition("@")[0]) for e in Ledger.of(config).trained if "@" in e}
    assert in_pieces
    assert not in_pieces & kept_whole
    assert sum(metric(config, "staleness/pieces")) == len(
        [e for e in Ledger.of(config).trained if "@" in e]
    )


def test_a_crash_repeats_no_token_of_a_harvested_rollout(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    harvest = {"deadline_s": 1e-6, "min_tokens": 3, "full_length_fraction": 0.0}
    changes = {
        "steps": 16,
        "sampling.max_new_tokens": 24,
        "checkpoint.every_steps": 1,
        **streaming(max_staleness_steps=40, max_in_flight=6, harvest=harvest),
    }
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    crashing = Batches(crash_after=6)
    with pytest.raises(Stop):
        run_streaming(config, lambda parts: crashing.watch(ragged(parts)))
    before = Ledger.of(config).trained
    run_streaming(config, ragged)
    ledger = Ledger.of(config).trained
    assert any("@" in entry for entry in before)
    assert len(set(ledger)) == len(ledger)
    pieces = {number_in(entry) for entry in ledger if "@" in entry}
    whole = {number_in(entry) for entry in ledger if "@" not in entry}
    assert not pieces & whole
    starts = [entry.partition("+")[0] for entry in ledger if "@" in entry]
    assert len(set(starts)) == len(starts)


def number_in(entry: str) -> int:
    return int(entry.partition("@")[0])


def test_a_batch_does_not_part_a_prompts_samples() -> None:
    def of(*numbers: int) -> list[Any]:
        return [SimpleNamespace(number=number) for number in numbers]

    def cut(ready: list[Any], size: int) -> list[int]:
        return [item.number for item in whole_prompts(ready, size, samples=2)]

    assert cut(of(0, 1, 2, 3, 4, 5), 4) == [0, 1, 2, 3]
    assert cut(of(0, 2, 3, 4, 5), 4) == [0, 2, 3]  # number 1 was dropped
    assert cut(of(0, 2), 4) == [0, 2]


def test_a_prefix_budget_shortens_all_but_some(tiny_models: TinyModels, tmp_path: Path) -> None:
    prefix = {"tokens": 5, "full_length_fraction": 0.3}
    changes = {
        "steps": 10,
        "sampling.max_new_tokens": 12,
        **streaming(prefix=prefix, max_staleness_steps=9, max_steps_ahead=4),  # nothing is stale
    }
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    seen = Batches()
    run_streaming(config, seen.watch)
    limits = Counter(
        item.rollout.sampling.max_new_tokens for batch in seen.batches for item in batch.scored
    )
    assert set(limits) == {5, 12}
    full = sum(is_full_length(config.seed, number, 0.3) for number in range(40))
    assert limits[12] == full
    assert 4 < full < 20


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (streaming(max_in_flight=1), "samples_per_prompt=2 is more than the 1"),
        (
            {**TASK_REWARD, **streaming(harvest={"deadline_s": 1.0})},
            r"pipeline.harvest with .*task_reward_weight=0.5",
        ),
        (
            {
                "objective": {"kind": "sampled_reverse_kl", "discount": 0.5},
                **streaming(prefix={"tokens": 4}),
            },
            r"pipeline.prefix with objective.discount=0.5",
        ),
        (
            streaming(max_staleness_steps=2, max_steps_ahead=3),
            r"max_steps_ahead=3 is more than max_staleness_steps=2",
        ),
    ],
)
def test_settings_that_cannot_work_together_are_refused(
    tiny_models: TinyModels, tmp_path: Path, changes: Values, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_config(tiny_models, tmp_path / "run", changes)


# --- Helpers, and fakes for faults ---------------------------------------------------------------


def run_streaming(config: RunConfig, adapt: Callable[[Parts], Parts]) -> None:
    """To the end, in this process."""
    assert run(config, RecordingReporter(), raise_warning, adapt)


@dataclass
class Batches:
    """Watches a learner's steps, and ends the run after some."""

    crash_after: int | None = None
    interrupt_after: int | None = None
    method: str = "update"
    batches: list[Batch] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)

    def watch(self, parts: Parts) -> Parts:
        learner: Any = parts.learner
        update = getattr(learner, self.method)

        async def watched(batch: Batch) -> Any:
            if self.crash_after is not None and len(self.batches) == self.crash_after:
                raise Stop
            self.batches.append(batch)
            self.steps.append(learner.version)
            if len(self.batches) == self.interrupt_after:
                os.kill(os.getpid(), signal.SIGINT)
            return await update(batch)

        setattr(learner, self.method, watched)
        return parts


class _Wrapped:
    """A part that is another one, but for what a fake changes."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class HoldsBack(_Wrapped):
    """FAKE: gives some rollouts only when ``until`` others have come, or never."""

    def __init__(self, inner: Any, numbers: set[int], until: int) -> None:
        super().__init__(inner)
        self._numbers, self._until, self._given = numbers, until, 0

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        held: list[Rollout] = []
        async for rollout in self._inner.generate(requests):
            if number_of(rollout.rollout_id) in self._numbers:
                held.append(rollout)
            else:
                self._given += 1
                yield rollout
        for rollout in held:
            while self._given < self._until:
                await asyncio.sleep(0.005)
            yield rollout


class CountsBegun(_Wrapped):
    """Notes the learner's steps and the rollouts asked for so far, whenever some are asked for."""

    def __init__(self, inner: Any, learner: Any, begun: list[tuple[int, int]]) -> None:
        super().__init__(inner)
        self._learner, self._begun = learner, begun

    def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        before = self._begun[-1][1] if self._begun else 0
        self._begun.append((self._learner.version.step, before + len(requests)))
        return self._inner.generate(requests)


class WaitsForPause:
    """FAKE: a learner that is slower than the rollouts, and an engine whose pauses are counted."""

    def __init__(self) -> None:
        self.pauses = self.resumes = self.decoded_while_paused = 0
        self.ended_at_pause: list[int] = []
        self.left_at_pause: list[int] = []
        self._ended = self._begun = self._taken = 0

    def watch(self, parts: Parts) -> Parts:
        waits = self
        inner: Any = ragged(parts).engine
        learner: Any = parts.learner
        update = learner.update

        class Engine(_Wrapped):
            async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
                waits._begun += len(requests)
                async for rollout in self._inner.generate(requests):
                    waits._ended += 1
                    yield rollout

            async def pause(self) -> None:
                waits.pauses += 1
                waits.ended_at_pause.append(waits._ended - waits._taken)
                waits.left_at_pause.append(waits._begun - waits._ended)
                await self._inner.pause()

            async def resume(self) -> None:
                waits.resumes += 1
                await self._inner.resume()

        async def behind(batch: Batch) -> Any:
            waits._taken += len(batch.scored)
            before, idle = waits._ended, 0
            while waits.pauses == waits.resumes and idle < 40:
                await asyncio.sleep(0.01)
                idle = idle + 1 if waits._ended == before else 0
                before = waits._ended
            if waits.pauses > waits.resumes:
                sizes = [p.response_ids.size for p in await inner.prefixes()]
                await asyncio.sleep(0.05)
                later = [p.response_ids.size for p in await inner.prefixes()]
                waits.decoded_while_paused += sum(later) - sum(sizes)
            return await update(batch)

        learner.update = behind
        return replace(parts, engine=Engine(inner))  # pyright: ignore[reportArgumentType]


def number_of(rollout_id: str) -> int:
    """By the names of `tiny_config`: two prompts a step, two samples each."""
    step, prompt, sample = (int(part.rpartition("-")[2]) for part in rollout_id.split("/")[:3])
    return 4 * step + 2 * prompt + sample


class _Ragged(_Wrapped):
    """Gives rollouts lengths of their own: some end long before others."""

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        changed = [
            replace(
                request,
                sampling=replace(
                    request.sampling,
                    max_new_tokens=request.sampling.max_new_tokens
                    if number_of(request.rollout_id) % 5 == 0
                    else 1 + number_of(request.rollout_id) % 4,
                ),
            )
            if request.rollout_id.startswith("step-")
            else request
            for request in requests
        ]
        async for rollout in self._inner.generate(changed):
            yield rollout


def ragged(parts: Parts) -> Parts:
    return replace(parts, engine=_Ragged(parts.engine))  # pyright: ignore[reportArgumentType]


class Tap:
    """Keeps what the engine finished."""

    def __init__(self) -> None:
        self.finished: dict[str, Rollout] = {}

    def watch(self, parts: Parts) -> Parts:
        tap = self

        class Tapped(_Wrapped):
            async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
                async for rollout in self._inner.generate(requests):
                    tap.finished[rollout.rollout_id] = rollout
                    yield rollout

        return replace(parts, engine=Tapped(parts.engine))  # pyright: ignore[reportArgumentType]


class Hangs(_Wrapped):
    """FAKE: one of its calls does not end; the engine's first load does."""

    def __init__(self, inner: Any, method: str) -> None:
        super().__init__(inner)
        calls = itertools.count(1 if method != "load" else 0)

        async def hang(*arguments: Any) -> Any:
            if next(calls) == 0:
                return await getattr(inner, method)(*arguments)
            await asyncio.Event().wait()

        setattr(self, method, hang)


class HangingTeacher(_Wrapped):
    """FAKE: never answers after the first call."""

    _calls = 0

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        self._calls += 1
        if self._calls > 1:
            await asyncio.Event().wait()
        return await self._inner.score(jobs)


class FailingTeacher(_Wrapped):
    """FAKE."""

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        raise EngineError("the teacher is broken")


class FailingEngine(_Wrapped):
    """FAKE: breaks at the second call."""

    _calls = 0

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        self._calls += 1
        if self._calls > 1:
            raise EngineError("the engine is broken")
        async for rollout in self._inner.generate(requests):
            yield rollout


class Unscored(_Wrapped):
    """FAKE: some rollouts get no score."""

    def __init__(self, inner: Any, numbers: set[int]) -> None:
        super().__init__(inner)
        self._numbers = numbers

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        results = await self._inner.score(jobs)
        return [
            ScoreFailure(rollout_id=job.rollout_id, reason="said the fake")
            if number_of(job.rollout_id) in self._numbers
            else result
            for job, result in zip(jobs, results, strict=True)
        ]
