"""New weights are loaded beside the learner's next step, and before whatever needs them."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qwen3_distill.config import StreamingPipeline
from qwen3_distill.errors import StallError, WeightVersionError
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.push import WeightPush
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.recording.trace import Trace
from qwen3_distill.types import Batch, WeightVersion
from qwen3_distill.utils.concurrency import TaskScope
from qwen3_distill.weights.directory import DirectoryChannel
from tests.pipeline.builders import EVALUATION, RecordingReporter, raise_warning, tiny_config
from tests.tiny_models import TinyModels

STREAMING = {"kind": "streaming", "stall_timeout_s": 5.0}


class FakeParts:
    """FAKE: learner, engine and channel in one, which note their calls; a load ends when told."""

    def __init__(self, *, reach: str = "machine", **pipeline: Any) -> None:
        settings = StreamingPipeline.model_validate({**STREAMING, **pipeline})
        ahead = settings.max_steps_ahead
        self.config = SimpleNamespace(
            pipeline=settings,
            max_steps_ahead=settings.max_staleness_steps if ahead is None else ahead,
        )
        self.learner = self.engine = self.channel = self
        self.following: object | None = None
        self.reach = reach
        self.calls: list[str] = []
        self.may_load = asyncio.Event()
        self.error: Exception | None = None
        self.has_switched = False
        self._step = 0

    @property
    def version(self) -> WeightVersion:
        return WeightVersion(step=self._step, digest=f"digest-{self._step}")

    def step(self) -> None:
        self._step += 1
        self.calls.append(f"step {self._step}")

    async def publish(self, channel: object) -> WeightVersion:
        self.calls.append(f"publish {self._step}")
        return self.version

    async def load(self, version: WeightVersion, channel: object) -> None:
        self.calls.append(f"load {version.step}")
        await self.may_load.wait()
        error, self.error = self.error, None
        if error is not None:
            raise error
        self.calls.append(f"serves {version.step}")

    async def follow(self, version: WeightVersion, channel: object) -> None:
        self.calls.append(f"follows {version.step}")

    def switched_transport(self, version: WeightVersion) -> bool:
        return self.has_switched


def played(
    play: Callable[[FakeParts, WeightPush], Awaitable[None]], **settings: Any
) -> tuple[list[str], list[float | None]]:
    """Return the calls, and the seconds of loads that the metrics have."""

    async def inner() -> tuple[list[str], list[float | None]]:
        parts = FakeParts(**settings)
        async with TaskScope() as scope:
            push = WeightPush(cast(Parts, cast(Any, parts)), Trace(), scope)
            await play(parts, push)
        return parts.calls, [metric.total for metric in push.metrics()]

    return asyncio.run(inner())


async def a_step_beside(parts: FakeParts, push: WeightPush) -> None:
    parts.step()
    await push.push(waits=False)
    await asyncio.sleep(0.01)
    parts.step()
    parts.may_load.set()
    await push.finish()


async def a_step_after(parts: FakeParts, push: WeightPush, *, waits: bool = False) -> None:
    """The load ends only if the push waits for it."""
    parts.step()
    pushed = asyncio.create_task(push.push(waits=waits))
    await asyncio.sleep(0.01)
    assert not pushed.done()
    parts.may_load.set()
    await pushed
    parts.step()


def test_the_learner_steps_while_the_engine_loads() -> None:
    calls, seconds = played(a_step_beside)
    assert calls == ["step 1", "publish 1", "load 1", "step 2", "serves 1"]
    assert len(seconds) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"reach": "process"},
        {"max_staleness_steps": 0},
        {"max_steps_ahead": 0},
        {"weight_updates": "boundary"},
    ],
    ids=["one process", "on-policy", "not ahead", "boundary"],
)
def test_it_waits_where_the_next_step_needs_the_load(settings: dict[str, Any]) -> None:
    calls, _ = played(a_step_after, **settings)
    assert calls == ["step 1", "publish 1", "load 1", "serves 1", "step 2"]


def test_it_waits_when_it_is_told_to() -> None:
    async def play(parts: FakeParts, push: WeightPush) -> None:
        await a_step_after(parts, push, waits=True)

    calls, _ = played(play)
    assert calls == ["step 1", "publish 1", "load 1", "serves 1", "step 2"]


def test_it_waits_for_a_teacher_that_follows_the_student() -> None:
    async def play(parts: FakeParts, push: WeightPush) -> None:
        parts.following = parts
        parts.may_load.set()
        parts.step()
        push = WeightPush(cast(Parts, cast(Any, parts)), Trace(), push._scope)
        await push.push(waits=False)

    calls, _ = played(play)
    assert calls == ["step 1", "publish 1", "load 1", "serves 1", "follows 1"]


def test_nothing_is_published_before_the_last_version_is_loaded() -> None:
    async def play(parts: FakeParts, push: WeightPush) -> None:
        parts.step()
        await push.push(waits=False)
        parts.step()
        second = asyncio.create_task(push.push(waits=False))
        await asyncio.sleep(0.01)
        assert "publish 2" not in parts.calls
        parts.may_load.set()
        await second
        await push.finish()

    calls, _ = played(play)
    order = ["publish 1", "load 1", "serves 1", "publish 2", "load 2", "serves 2"]
    assert [call for call in calls if not call.startswith("step")] == order


def test_a_channel_that_switched_its_transport_publishes_again_after_the_step() -> None:
    async def play(parts: FakeParts, push: WeightPush) -> None:
        parts.error, parts.has_switched = WeightVersionError("no IPC here"), True
        await a_step_beside(parts, push)

    calls, _ = played(play)
    after = ["publish 2", "load 2", "serves 2"]
    assert calls == ["step 1", "publish 1", "load 1", "step 2", *after]


def test_other_weights_in_use_end_the_run() -> None:
    async def play(parts: FakeParts, push: WeightPush) -> None:
        parts.error = WeightVersionError("other weights arrived")
        await a_step_beside(parts, push)

    with pytest.raises(WeightVersionError, match="other weights arrived"):
        played(play)


def test_a_load_that_hangs_ends_the_run() -> None:
    async def play(parts: FakeParts, push: WeightPush) -> None:
        parts.step()
        await push.push(waits=False)
        await push.finish()

    with pytest.raises(StallError, match="the engine to serve the new weights"):
        played(play, stall_timeout_s=0.05)


# --- In a run -------------------------------------------------------------------------------------


def test_a_run_loads_beside_its_steps_but_before_evaluations(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    """The engine's load of a version waits for the learner's next step, where there is one."""
    changes = {
        "steps": 6,
        "pipeline": {"kind": "streaming", "stall_timeout_s": 30.0},
        "evaluation": {**EVALUATION, "every_steps": 3},
    }
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    events: list[str] = []

    def watch(parts: Parts) -> Parts:
        engine: Any = parts.engine
        learner: Any = parts.learner
        load, update = engine.load, learner.update
        begun = [asyncio.Event() for _ in range(7)]

        async def watched_update(batch: Batch) -> Any:
            begun[learner.version.step].set()
            events.append(f"step {learner.version.step + 1}")
            return await update(batch)

        async def watched_load(version: WeightVersion, channel: Any) -> None:
            if version.step in {1, 2, 4, 5}:
                await begun[version.step].wait()
            await load(version, channel)
            events.append(f"load {version.step}")

        engine.load, learner.update = watched_load, watched_update
        return replace(parts, channel=DirectoryChannel(tmp_path / "channel"))

    assert run(config, RecordingReporter(), raise_warning, watch)
    for step in range(1, 6):
        first, then = (step, step + 1) if step == 3 else (step + 1, step)
        names = (
            (f"load {first}", f"step {then}") if step == 3 else (f"step {first}", f"load {then}")
        )
        assert events.index(names[0]) < events.index(names[1]), events
    records = read_jsonl(config.output_path / "metrics.jsonl")
    # A step has the seconds of the load that ended in it.
    assert [("weights/load_s" in record) for record in records] == [
        False, True, True, False, True, True,
    ]  # fmt: skip
    trained = [
        e for r in read_jsonl(config.output_path / "ledger.jsonl") for e in r["trained"].split()
    ]
    assert len(trained) == len(set(trained)) == 6 * 4
