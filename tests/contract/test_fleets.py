"""Fleets of real processes on this machine: what happens when members die, without Ray."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_distill.config import EmbeddedGeneration, EmbeddedScoring
from qwen3_distill.errors import EngineLost, HandshakeError, WeightVersionError
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.generation.embedded.hosted import hosted_embedded_engine
from qwen3_distill.generation.fleet import RolloutFleet
from qwen3_distill.generation.hosted import HostedRolloutEngine
from qwen3_distill.hosts import members
from qwen3_distill.hosts.fleet_state import MemberState
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.ports import WeightChannel
from qwen3_distill.scoring.embedded.hosted import hosted_embedded_teacher
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.fleet import TeacherFleet
from qwen3_distill.types import Rollout, SampledRequest, WeightVersion
from qwen3_distill.weights.memory import MemoryChannel
from tests.contract.builders import (
    directory_weights,
    generate,
    published,
    ragged_requests,
    run,
    scores_of,
    serve,
    synthetic_rollout,
)
from tests.engines import LOGS
from tests.tiny_models import TinyModels, write_model

GENERATION: dict[str, Any] = {
    "kind": "embedded",
    "device": "cpu",
    "own_process": True,
    "threads": 1,
    "max_restarts": 0,
}
SCORING = dict(GENERATION)


def in_process(model_dir: Path) -> EmbeddedRolloutEngine:
    return EmbeddedRolloutEngine(model_dir, device="cpu", dtype="float32", max_sequences=64)


def tokens_by_id(rollouts: list[Rollout]) -> dict[str, list[int]]:
    return {rollout.rollout_id: rollout.response_ids.tolist() for rollout in rollouts}


@pytest.fixture(scope="module")
def expected(tiny_models: TinyModels) -> dict[str, list[int]]:
    """What one engine samples for the ragged requests."""
    engine = in_process(tiny_models.student)
    serve(engine, directory_weights(tiny_models.student))
    return tokens_by_id(generate(engine, ragged_requests()))


class Fleet:
    """A fleet of two processes, and what it warned of."""

    def __init__(self, model_dir: Path) -> None:
        self.warnings: list[str] = []
        self.replicas = [
            hosted_embedded_engine(
                model_dir,
                EmbeddedGeneration.model_validate(GENERATION),
                log=LOGS / f"fleet-{i}.log",
            )
            for i in range(2)
        ]
        self.fleet = RolloutFleet(
            self.replicas, max_restarts=1, minimum=2, warn=self.warnings.append
        )

    async def until_serving(self, count: int) -> None:
        while len(self.fleet.state.serving) < count:
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def processes(tiny_models: TinyModels) -> Iterator[Fleet]:
    fleet = Fleet(tiny_models.student)
    run(fleet.fleet.start())
    yield fleet
    run(fleet.fleet.close())


def test_requests_of_a_killed_replica_are_sampled_elsewhere_with_the_same_seeds(
    processes: Fleet, tiny_models: TinyModels, expected: dict[str, list[int]]
) -> None:
    fleet = processes.fleet
    weights = directory_weights(tiny_models.student)
    version, channel = published(weights)

    struck = processes.replicas[0].host
    assert isinstance(struck, LocalProcess)

    async def killed_on_the_way() -> list[Rollout]:
        await fleet.load(version, channel)
        assert struck.pid is not None
        os.killpg(struck.pid, signal.SIGSTOP)  # it cannot end before it is killed
        found = []
        async for rollout in fleet.generate(ragged_requests()):
            if not found:
                struck.kill()
            found.append(rollout)
        return found

    found = run(killed_on_the_way())
    assert len(found) == len(expected)
    assert tokens_by_id(found) == expected
    assert {span.version for rollout in found for span in rollout.versions} == {version}
    run(processes.until_serving(2))
    assert fleet.counters["health/rollout_engine_restarts"] == 1
    assert processes.replicas[0].version == version, "it serves what it has loaded and read back"
    again = run(_collect(fleet))
    assert tokens_by_id(again) == expected


async def _collect(fleet: RolloutFleet) -> list[Rollout]:
    return [rollout async for rollout in fleet.generate(ragged_requests())]


def test_a_fleet_with_too_few_replicas_left_says_how_each_was_lost(processes: Fleet) -> None:
    """The second death of replica 0, whose budget is one restart."""
    processes.replicas[0].host.kill()
    with pytest.raises(EngineLost, match=r"1 of 2 members are left.*\n.*member 0: .*died"):
        run(_collect(processes.fleet))
    assert processes.fleet.state.state(0) is MemberState.RETIRED
    assert "it is retired" in processes.warnings[-1]


class _Refuses(EmbeddedRolloutEngine):
    """A fault: it refuses to load, as often as it is told to."""

    refusals = 0
    num_starts = 0

    async def start(self) -> None:
        self.num_starts += 1

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        if self.refusals > 0:
            self.refusals -= 1
            raise WeightVersionError("the weights in use are not the published ones")
        await super().load(version, channel)


def test_a_replica_that_alone_cannot_load_serves_nothing_and_is_started_again(
    tiny_models: TinyModels, expected: dict[str, list[int]]
) -> None:
    bad = _Refuses(tiny_models.student, device="cpu", dtype="float32", max_sequences=64)
    warnings: list[str] = []
    fleet = RolloutFleet(
        [bad, in_process(tiny_models.student)], max_restarts=1, warn=warnings.append
    )

    async def load_and_sample() -> list[Rollout]:
        await fleet.start()
        bad.refusals = 1
        await fleet.load(*published(directory_weights(tiny_models.student)))
        assert fleet.state.serving == [1]
        found = await _collect(fleet)
        while fleet.awaited:
            await asyncio.sleep(0.01)
        return found

    found = run(load_and_sample())
    assert tokens_by_id(found) == expected
    assert fleet.counters["fleet/rollout_0_tokens"] == 0
    assert bad.num_starts == 2
    assert "not the published ones" in warnings[0]
    run(fleet.close())


def test_a_replica_that_loads_slowly_is_named_meanwhile(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "_PATIENCE_S", 0.01)
    said = asyncio.Event()

    class Slow(EmbeddedRolloutEngine):
        async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
            await asyncio.wait_for(said.wait(), 30)
            await super().load(version, channel)

    slow = Slow(tiny_models.student, device="cpu", dtype="float32", max_sequences=64)
    fleet = RolloutFleet(
        [in_process(tiny_models.student), slow], max_restarts=1, warn=lambda text: None
    )
    words: list[str] = []

    def say(text: str) -> None:
        words.append(text)
        if "rollout replica 0" not in text:  # it has loaded
            said.set()

    fleet.tell(say)
    run(fleet.start())
    serve(fleet, directory_weights(tiny_models.student))
    assert words[-1] == "waiting for rollout replica 1 (stale) to load the new weights"
    run(fleet.close())


def test_how_far_a_replica_lags_is_known_during_a_load_too(tiny_models: TinyModels) -> None:
    lags: list[list[float | None]] = []

    class Watched(EmbeddedRolloutEngine):
        async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
            await super().load(version, channel)
            await asyncio.sleep(0.1)  # the other replica has loaded
            counters = fleet.counters
            lags.append([counters.get(f"fleet/rollout_{i}_lag_steps") for i in range(2)])

    watched = Watched(tiny_models.student, device="cpu", dtype="float32", max_sequences=64)
    fleet = RolloutFleet(
        [in_process(tiny_models.student), watched], max_restarts=1, warn=lambda text: None
    )
    run(fleet.start())
    for step in range(2):
        serve(fleet, directory_weights(tiny_models.student), step)
    # Before any version is served by all there is none; a replica that is ahead does not lag.
    assert lags == [[None, None], [0, 0]]
    run(fleet.close())


def test_what_is_waited_for_is_not_said_of_nobody(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica serves from within its load on; the load itself ends a moment later."""
    monkeypatch.setattr(members, "_PATIENCE_S", 0.01)
    fleet = RolloutFleet([in_process(tiny_models.student)], max_restarts=1, warn=lambda text: None)
    words: list[str] = []
    fleet.tell(words.append)

    async def wait_while_all_serve() -> None:
        async with fleet._members.saying("to load the new weights"):
            await asyncio.sleep(0.1)

    run(fleet.start())
    serve(fleet, directory_weights(tiny_models.student))
    run(wait_while_all_serve())
    assert "waiting for  to load the new weights" not in words
    run(fleet.close())


def test_a_version_that_no_replica_can_load_is_served_by_none(tiny_models: TinyModels) -> None:
    fleet = RolloutFleet([in_process(tiny_models.student)] * 1, max_restarts=0, warn=print)
    run(fleet.start())
    with pytest.raises(WeightVersionError, match="publish it first"):
        run(fleet.load(WeightVersion(step=3, digest="absent"), MemoryChannel()))
    with pytest.raises(WeightVersionError, match="no weights yet"):
        _ = fleet.version
    run(fleet.close())


def test_jobs_of_a_killed_teacher_are_scored_by_another(tiny_models: TinyModels) -> None:
    teachers = [
        hosted_embedded_teacher(
            EmbeddedScoring.model_validate(SCORING | {"model": str(tiny_models.teacher)}),
            request=SampledRequest(),
            log=LOGS / f"fleet-teacher-{i}.log",
        )
        for i in range(2)
    ]
    warnings: list[str] = []
    fleet = TeacherFleet(teachers, max_restarts=1, warn=warnings.append)
    run(fleet.start())
    rollouts = [synthetic_rollout(5, 40, seed) for seed in range(6)]
    before = np.concatenate([score.logprobs for score in scores_of(fleet, rollouts)])
    teachers[0].host.kill()
    after = np.concatenate([score.logprobs for score in scores_of(fleet, rollouts)])
    assert after == pytest.approx(before, abs=1e-4)
    assert "teacher 0 was lost" in warnings[0]
    run(fleet.close())


def test_a_fleet_of_different_teachers_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=9, tie_word_embeddings=False, hidden_size=48)
    teachers = [
        EmbeddedTeacher(
            model_dir,
            request=SampledRequest(),
            device="cpu",
            dtype="float32",
            batch_tokens=1024,
            chunk_tokens=64,
        )
        for model_dir in (tiny_models.teacher, other)
    ]
    with pytest.raises(HandshakeError, match=r"teacher 1 of the fleet is .*the others are"):
        run(TeacherFleet(teachers, max_restarts=3, warn=print).start())


def test_a_hosted_engine_of_a_fleet_does_not_restart_itself(tiny_models: TinyModels) -> None:
    engine = hosted_embedded_engine(
        tiny_models.student, EmbeddedGeneration.model_validate(GENERATION), log=LOGS / "alone.log"
    )
    assert isinstance(engine, HostedRolloutEngine)
    run(engine.start())
    engine.host.kill()
    with pytest.raises(EngineLost, match="died"):
        run(engine.prefixes())
    run(engine.close())
