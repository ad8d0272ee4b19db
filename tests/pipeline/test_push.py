"""New weights are loaded beside the learner's next step, and before whatever needs them."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qwen3_distill.config import RunConfig, StreamingPipeline
from qwen3_distill.errors import StallError, WeightVersionError
from qwen3_distill.pipeline.assembly.channel import loads_beside_steps
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.push import WeightPush
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.recording.trace import Trace
from qwen3_distill.types import Batch, WeightVersion
from qwen3_distill.utils.concurrency import TaskScope
from qwen3_distill.weights.directory import DirectoryChannel
from tests.pipeline.builders import (
    EVALUATION,
    RecordingReporter,
    Values,
    raise_warning,
    tiny_config,
)
from tests.tiny_models import TinyModels

STREAMING = {"kind": "streaming", "stall_timeout_s": 5.0}


class FakeParts:
    """FAKE: learner, engine and channel in one, which note their calls; a load ends when told."""

    def __init__(self, *, beside: bool = True, follows: bool = False, **pipeline: Any) -> None:
        settings = StreamingPipeline.model_validate({**STREAMING, **pipeline})
        ahead = settings.max_steps_ahead
        self.config = SimpleNamespace(
            pipeline=settings,
            max_steps_ahead=settings.max_staleness_steps if ahead is None else ahead,
        )
        self.learner = self.engine = self.channel = self
        self.loads_beside_steps = beside
        self.following = self if follows else None
        self.calls: list[str] = []
        self.may_load = asyncio.Event()
        self.error: Exception | None = None
        self.hangs = False
        self._step = 0

    @property
    def version(self) -> WeightVersion:
        return WeightVersion(step=self._step, digest=f"digest-{self._step}")

    def step(self) -> None:
        self._step += 1
        self.calls.append(f"step {self._step}")

    async def publish(self, channel: object) -> WeightVersion:
        self.calls.append(f"publish {self._step}")
        if self.hangs:
            await asyncio.Event().wait()
        return self.version

    async def load(self, version: WeightVersion, channel: object) -> None:
        self.calls.append(f"load {version.step}")
        await self.may_load.wait()
        if self.error is not None:
            raise self.error
        self.calls.append(f"serves {version.step}")

    async def follow(self, version: WeightVersion, channel: object) -> None:
        self.calls.append(f"follows {version.step}")

    def switched_transport(self, version: WeightVersion) -> bool:
        return False


class Played:
    """Plays pushes and steps, and keeps the calls, the trace and the seconds of loads."""

    def __init__(
        self, play: Callable[[FakeParts, WeightPush], Awaitable[None]], **settings: Any
    ) -> None:
        self.trace = Trace()
        self.calls: list[str] = []
        self.load_s: list[float | None] = []
        asyncio.run(self._play(play, settings))

    async def _play(self, play: Any, settings: dict[str, Any]) -> None:
        parts = FakeParts(**settings)
        async with TaskScope() as scope:
            push = WeightPush(cast(Parts, cast(Any, parts)), self.trace, scope)
            await play(parts, push)
        self.calls = parts.calls
        self.load_s = [metric.total for metric in push.metrics()]
        assert not push.metrics()


async def a_step_beside(parts: FakeParts, push: WeightPush) -> None:
    parts.step()
    await push.publish(waits=False)
    await asyncio.sleep(0.01)
    parts.step()
    parts.may_load.set()
    await push.finish()


async def a_step_after(parts: FakeParts, push: WeightPush, *, waits: bool = False) -> None:
    """The load ends only if the push waits for it."""
    parts.step()
    pushed = asyncio.create_task(push.publish(waits=waits))
    await asyncio.sleep(0.01)
    assert not pushed.done()
    parts.may_load.set()
    await pushed
    parts.step()


def test_the_learner_steps_while_the_engine_loads() -> None:
    played = Played(a_step_beside)
    assert played.calls == ["step 1", "publish 1", "load 1", "step 2", "serves 1"]
    assert len(played.load_s) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"beside": False},
        {"max_staleness_steps": 0},
        {"max_steps_ahead": 0},
        {"weight_updates": "boundary"},
        {"pause_at_ready_steps": 1},
        {"harvest": {"deadline_s": 1.0}},
    ],
    ids=["one process", "on-policy", "not ahead", "boundary", "pauses", "harvests"],
)
def test_it_waits_where_something_needs_the_load(settings: Values) -> None:
    played = Played(a_step_after, **settings)
    assert played.calls == ["step 1", "publish 1", "load 1", "serves 1", "step 2"]


def test_it_waits_when_it_is_told_to() -> None:
    async def play(parts: FakeParts, push: WeightPush) -> None:
        await a_step_after(parts, push, waits=True)

    assert Played(play).calls == ["step 1", "publish 1", "load 1", "serves 1", "step 2"]


def test_it_waits_for_a_teacher_that_follows_the_student() -> None:
    calls = Played(a_step_after, follows=True).calls
    assert calls == ["step 1", "publish 1", "load 1", "serves 1", "follows 1", "step 2"]


def test_nothing_is_published_before_the_last_version_is_loaded() -> None:
    async def play(parts: FakeParts, push: WeightPush) -> None:
        parts.step()
        await push.publish(waits=False)
        parts.step()
        second = asyncio.create_task(push.publish(waits=False))
        await asyncio.sleep(0.05)
        assert "publish 2" not in parts.calls
        parts.may_load.set()
        await second
        await push.finish()

    played = Played(play)
    order = ["publish 1", "load 1", "serves 1", "publish 2", "load 2", "serves 2"]
    assert [call for call in played.calls if not call.startswith("step")] == order
    # The learner waited for the load: that is part of publishing.
    assert played.trace.busy_seconds("publish") > 0.03


def test_other_weights_in_use_end_the_run() -> None:
    async def play(parts: FakeParts, push: WeightPush) -> None:
        parts.error = WeightVersionError("other weights arrived")
        await a_step_beside(parts, push)

    with pytest.raises(WeightVersionError, match="other weights arrived"):
        Played(play)


@pytest.mark.parametrize(
    ("hangs", "what"),
    [(True, "the learner to publish its weights"), (False, "the engine to serve the new weights")],
)
def test_what_hangs_ends_the_run(hangs: bool, what: str) -> None:
    async def play(parts: FakeParts, push: WeightPush) -> None:
        parts.hangs = hangs
        parts.step()
        await push.publish(waits=False)
        await push.finish()

    with pytest.raises(StallError, match=what):
        Played(play, stall_timeout_s=0.05)


def test_learner_and_engine_need_processes_of_their_own(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    def beside(engine: bool, learner: bool) -> bool:
        changes = {"generation.own_process": engine, "training.own_process": learner}
        return loads_beside_steps(tiny_config(tiny_models, tmp_path, changes))

    assert beside(True, True)
    # A learner in this process blocks it: the load would begin after the step.
    assert not beside(True, False)
    assert not beside(False, True)


# --- In a run -------------------------------------------------------------------------------------


class LoadsHeld:
    """FAKE: a load of some versions ends only after the learner's next step has begun."""

    def __init__(self, folder: Path, held: set[int], interrupt_at: int | None = None) -> None:
        self.events: list[str] = []
        self._folder, self._held, self._interrupt_at = folder, held, interrupt_at

    def watch(self, parts: Parts) -> Parts:
        engine: Any = parts.engine
        learner: Any = parts.learner
        load, update = engine.load, learner.update
        begun = [asyncio.Event() for _ in range(parts.config.steps + 1)]

        async def watched_update(batch: Batch) -> Any:
            step = learner.version.step
            begun[step].set()
            self.events.append(f"step {step + 1}")
            if step + 1 == self._interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
            return await update(batch)

        async def watched_load(version: WeightVersion, channel: Any) -> None:
            if version.step in self._held:
                await begun[version.step].wait()
            await load(version, channel)
            self.events.append(f"load {version.step}")

        engine.load, learner.update = watched_load, watched_update
        channel = DirectoryChannel(self._folder)
        return replace(parts, channel=channel, loads_beside_steps=True)


def config_of(tiny_models: TinyModels, path: Path, **changes: Any) -> RunConfig:
    pipeline = {"kind": "streaming", "stall_timeout_s": 30.0}
    return tiny_config(tiny_models, path, {"steps": 6, "pipeline": pipeline, **changes})


def trained(config: RunConfig) -> list[int]:
    records = read_jsonl(config.output_path / "ledger.jsonl")
    return sorted(int(entry) for record in records for entry in record["trained"].split())


def test_a_run_loads_beside_its_steps_but_before_evaluations(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    evaluation = {**EVALUATION, "every_steps": 3}
    config = config_of(tiny_models, tmp_path / "run", evaluation=evaluation)
    loads = LoadsHeld(tmp_path / "channel", {1, 2, 4, 5})
    assert run(config, RecordingReporter(), raise_warning, loads.watch)
    for step in (1, 2, 4, 5):
        assert loads.events.index(f"step {step + 1}") < loads.events.index(f"load {step}")
    assert loads.events.index("load 3") < loads.events.index("step 4")
    # A step has the seconds of the load that ended in it.
    has_load = ["weights/load_s" in r for r in read_jsonl(config.output_path / "metrics.jsonl")]
    assert has_load == [False, True, True, False, True, True]
    assert trained(config) == list(range(6 * 4))


def test_a_run_that_is_stopped_during_a_load_ends_it_and_goes_on(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = config_of(tiny_models, tmp_path / "run")
    loads = LoadsHeld(tmp_path / "channel", {1, 2}, interrupt_at=3)
    assert not run(config, RecordingReporter(), raise_warning, loads.watch)
    assert loads.events[-1] == "load 3"  # of the step that was taken, beside which load 2 ended
    assert "load 2" in loads.events
    again = LoadsHeld(tmp_path / "again", set())
    assert run(config, RecordingReporter(), raise_warning, again.watch)
    assert again.events[0] == "load 3"
    assert trained(config) == list(range(6 * 4))
