"""Embedded engines in processes of their own: the same answers, and how they come back."""

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen3_distill.config import (
    EmbeddedGeneration,
    EmbeddedScoring,
    EmbeddedTraining,
    SampledReverseKL,
)
from qwen3_distill.errors import (
    DataError,
    EngineError,
    EngineLost,
    EngineStartError,
    LearnerLost,
    WeightVersionError,
)
from qwen3_distill.generation.embedded.hosted import hosted_embedded_engine
from qwen3_distill.generation.hosted import HostedRolloutEngine
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.ports import FullWeights
from qwen3_distill.scoring.embedded.hosted import hosted_embedded_teacher
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.training.embedded.hosted import hosted_embedded_learner
from qwen3_distill.training.embedded.student import build_embedded_learner
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.types import Batch, Rollout, SampledRequest, ScoredRollout
from qwen3_distill.weights.adapter_files import version_name
from qwen3_distill.weights.directory import DirectoryChannel
from qwen3_distill.weights.memory import MemoryChannel
from tests.contract.adapters import build_embedded_process, with_module
from tests.contract.builders import (
    LONG,
    collect,
    collecting_when,
    directory_weights,
    generate,
    jobs_of,
    long_requests,
    pid_of,
    published,
    ragged_requests,
    run,
    scores_of,
    serve,
    synthetic_rollout,
)
from tests.contract.socket_host import SocketHost
from tests.engines import LOGS
from tests.tiny_models import CONTEXT_LENGTH, TinyModels

Strike = Callable[[int], None]


def kill_group(pid: int) -> None:
    os.killpg(pid, signal.SIGKILL)


def stop_group(pid: int) -> None:
    os.killpg(pid, signal.SIGSTOP)


STRIKES = pytest.mark.parametrize("strike", [kill_group, stop_group])


# --- Rollouts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tiny_models: TinyModels) -> Iterator[HostedRolloutEngine]:
    built = build_embedded_process(tiny_models.student, max_restarts=1000, hang_timeout_s=8.0)
    yield built
    run(built.close())


@pytest.fixture
def weights(tiny_models: TinyModels) -> dict[str, Tensor]:
    return directory_weights(tiny_models.student)


@pytest.fixture
def engine(shared: HostedRolloutEngine, weights: dict[str, Tensor]) -> HostedRolloutEngine:
    """Serves `weights`; it may be struck."""
    serve(shared, weights)
    return shared


def by_id(rollouts: list[Rollout]) -> dict[str, list[int]]:
    assert len({rollout.rollout_id for rollout in rollouts}) == len(rollouts)
    return {rollout.rollout_id: rollout.response_ids.tolist() for rollout in rollouts}


@STRIKES
def test_calls_under_way_get_every_rollout_once_though_the_process_is_lost(
    engine: HostedRolloutEngine, strike: Strike
) -> None:
    requests = [*ragged_requests(20, max_new_tokens=2), *long_requests(8, new_tokens=LONG)]
    others = [replace(request, rollout_id=f"other/{request.rollout_id}") for request in requests]
    expected = by_id(generate(engine, [*requests, *others]))
    restarts = engine.counters["health/rollout_engine_restarts"]

    async def strike_under_way() -> list[Rollout]:
        beside = asyncio.create_task(collect(engine, others))
        rollouts: list[Rollout] = []
        async for rollout in engine.generate(requests):
            rollouts.append(rollout)
            if len(rollouts) == 20:  # some are there, and some are not
                strike(pid_of(engine))
        return [*rollouts, *await beside]

    assert by_id(run(strike_under_way())) == expected
    assert engine.counters["health/rollout_engine_restarts"] == restarts + 1


def test_what_was_aborted_does_not_come_back_with_the_process(
    engine: HostedRolloutEngine,
) -> None:
    async def abort_and_kill() -> list[Rollout]:
        call, _ = await collecting_when(
            engine, long_requests(3, new_tokens=LONG), lambda seen: len(seen) == 3
        )
        await engine.abort(["long1"])
        engine.host.kill()
        return await call

    assert sorted(by_id(run(abort_and_kill()))) == ["long0", "long2"]


def test_an_engine_that_was_paused_is_paused_when_it_comes_back(
    engine: HostedRolloutEngine,
) -> None:
    async def pause_and_kill() -> list[Rollout]:
        await engine.pause()
        engine.host.kill()
        call = asyncio.create_task(collect(engine, ragged_requests(3)))
        assert await engine.prefixes() == []  # it is back
        await asyncio.sleep(0.3)
        assert not call.done()
        await engine.resume()
        return await call

    assert len(run(pause_and_kill())) == 3


def test_a_version_that_was_being_loaded_is_served_after_the_death(
    engine: HostedRolloutEngine, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    new = {name: tensor * 1.01 for name, tensor in weights.items()}
    version, _ = published(new, step=1)
    channel = DirectoryChannel(tmp_path)
    channel.publish(version, FullWeights(tensors=new))

    async def kill_under_the_load() -> list[Rollout]:
        call, _ = await collecting_when(
            engine, long_requests(4, new_tokens=LONG), lambda seen: len(seen) == 4
        )
        os.killpg(pid_of(engine), signal.SIGSTOP)
        loading = asyncio.create_task(engine.load(version, channel))
        await asyncio.sleep(0.1)
        engine.host.kill()
        await loading
        return await call

    rollouts = run(kill_under_the_load())
    assert engine.version == version
    assert {span.version for rollout in rollouts for span in rollout.versions} == {version}
    assert len(by_id(rollouts)) == 4


def test_rollouts_wait_for_the_version_that_has_taken_the_place_of_theirs(
    engine: HostedRolloutEngine,
    weights: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A channel that holds one version only, as CUDA IPC does: the next one is published just when
    the process that came back asks for what it served."""
    first, _ = published(weights)
    new = {name: tensor * 1.01 for name, tensor in weights.items()}
    second, _ = published(new, step=1)
    channel = DirectoryChannel(tmp_path)
    channel.publish(first, FullWeights(tensors=weights))
    ask_worker, loading = engine.host.call, list[asyncio.Task[None]]()

    async def publish_before(method: str, *arguments: Any, **settings: Any) -> Any:
        if method == "load" and not loading:
            channel.publish(second, FullWeights(tensors=new))
            shutil.rmtree(tmp_path / version_name(first))
            loading.append(asyncio.create_task(engine.load(second, channel)))
            await asyncio.sleep(0)
        return await ask_worker(method, *arguments, **settings)

    async def kill_and_come_back() -> list[Rollout]:
        await engine.load(first, channel)
        call, _ = await collecting_when(
            engine, long_requests(4, new_tokens=LONG), lambda seen: len(seen) == 4
        )
        monkeypatch.setattr(engine.host, "call", publish_before)
        engine.host.kill()
        rollouts = await call
        await loading[0]
        return rollouts

    rollouts = run(kill_and_come_back())
    assert engine.version == second
    assert len(by_id(rollouts)) == 4  # one may have ended before
    assert second in {span.version for rollout in rollouts for span in rollout.versions}


def test_a_version_that_cannot_be_loaded_by_the_process_that_came_back_is_an_error(
    engine: HostedRolloutEngine, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    version, _ = published(weights, step=1)
    channel = DirectoryChannel(tmp_path)
    channel.publish(version, FullWeights(tensors=weights))

    async def kill_under_the_load() -> None:
        os.killpg(pid_of(engine), signal.SIGSTOP)
        loading = asyncio.create_task(engine.load(version, channel))
        await asyncio.sleep(0.1)
        shutil.rmtree(tmp_path / version_name(version))
        engine.host.kill()
        await loading

    with pytest.raises(WeightVersionError, match="does not hold"):
        run(kill_under_the_load())
    with pytest.raises(WeightVersionError, match="does not hold"):
        generate(engine, ragged_requests(1))


def test_a_request_made_during_a_load_waits_for_it(
    engine: HostedRolloutEngine, weights: dict[str, Tensor]
) -> None:
    version, channel = published({name: t * 1.01 for name, t in weights.items()}, step=1)

    async def ask_under_the_load() -> list[Rollout]:
        loading = asyncio.create_task(engine.load(version, channel))
        await asyncio.sleep(0)
        rollouts = await collect(engine, ragged_requests(2))
        await loading
        return rollouts

    assert {rollout.oldest_version for rollout in run(ask_under_the_load())} == {version}


def test_a_death_while_it_comes_back_is_one_more_restart(engine: HostedRolloutEngine) -> None:
    restarts = engine.counters["health/rollout_engine_restarts"]

    async def kill_twice() -> list[Rollout]:
        first = pid_of(engine)
        engine.host.kill()
        call = asyncio.create_task(collect(engine, ragged_requests(3)))
        while pid_of(engine) == first:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        engine.host.kill()  # it has not even connected
        return await call

    assert len(run(kill_twice())) == 3
    assert engine.counters["health/rollout_engine_restarts"] == restarts + 2


@STRIKES
def test_a_worker_on_the_far_side_that_is_lost_comes_back(
    tiny_models: TinyModels, weights: dict[str, Tensor], strike: Strike
) -> None:
    """The same recovery over a host that is no local process."""
    engine = build_embedded_process(tiny_models.student, SocketHost, hang_timeout_s=8.0)
    requests = long_requests(4, new_tokens=LONG)

    async def strike_under_way() -> list[Rollout]:
        call, _ = await collecting_when(engine, requests, lambda seen: len(seen) == 4)
        strike(pid_of(engine))
        return await call

    try:
        version = serve(engine, weights)
        expected = by_id(generate(engine, requests))
        assert by_id(run(strike_under_way())) == expected
        assert engine.version == version
        assert engine.counters == {"health/rollout_engine_restarts": 1}
    finally:
        run(engine.close())


def test_an_engine_that_dies_too_often_is_given_up(
    tiny_models: TinyModels, weights: dict[str, Tensor]
) -> None:
    engine = build_embedded_process(tiny_models.student, max_restarts=0)
    serve(engine, weights)
    engine.host.kill()
    with pytest.raises(EngineLost, match="embedded rollout engine died"):
        generate(engine, ragged_requests(2))
    run(engine.close())


def test_asking_a_closed_engine_does_not_start_it(tiny_models: TinyModels) -> None:
    config = EmbeddedGeneration(kind="embedded", device="cpu", own_process=True)
    engine = hosted_embedded_engine(tiny_models.student, config, log=LOGS / "closed.log")
    run(engine.close())
    with pytest.raises(EngineLost, match="not running: start it first"):
        run(engine.prefixes())
    assert not engine.host.is_running


@pytest.mark.parametrize("dies", [False, True], ids=["lives", "dies"])
def test_a_prepared_worker_is_the_one_that_the_engine_is_opened_in(
    tiny_models: TinyModels, weights: dict[str, Tensor], dies: bool
) -> None:
    config = EmbeddedGeneration(kind="embedded", device="cpu", own_process=True)
    engine = hosted_embedded_engine(tiny_models.student, config, log=LOGS / "prepared.log")
    host = engine.host
    assert isinstance(host, LocalProcess)

    async def begin() -> tuple[int | None, int | None]:
        preparing = asyncio.create_task(engine.prepare())
        await asyncio.sleep(0)  # under way when the start comes
        pid: int | None = None
        if dies:
            await preparing
            pid = host.pid
            host.kill()
            while host.is_running:
                await asyncio.sleep(0.01)
        starting = asyncio.create_task(engine.start())
        await preparing
        if not dies:
            pid = host.pid
        await starting
        return pid, host.pid

    try:
        prepared, opened = run(begin())
        assert (prepared == opened) != dies
        serve(engine, weights)
        assert len(generate(engine, ragged_requests(2))) == 2
        assert host.pid == opened
        assert engine.counters == {"health/rollout_engine_restarts": 0}
    finally:
        run(engine.close())
    assert not host.is_running


def test_a_worker_that_cannot_be_prepared_says_why_and_is_gone(tiny_models: TinyModels) -> None:
    config = EmbeddedGeneration(kind="embedded", device="cpu", own_process=True)
    engine = hosted_embedded_engine(
        tiny_models.student,
        config,
        log=LOGS / "unprepared.log",
        make_host=with_module("no.such.module", LocalProcess),
    )
    with pytest.raises(EngineStartError, match=r"No module named 'no'"):
        run(engine.prepare())
    assert not engine.host.is_running
    run(engine.close())


# --- Scores -------------------------------------------------------------------------------------


@STRIKES
def test_a_teacher_that_is_lost_scores_again_as_the_one_here(
    tiny_models: TinyModels, strike: Strike
) -> None:
    here = EmbeddedTeacher(
        tiny_models.teacher,
        request=SampledRequest(),
        device="cpu",
        dtype="float32",
        batch_tokens=64,
        chunk_tokens=1024,
    )
    config = EmbeddedScoring(
        kind="embedded",
        model=str(tiny_models.teacher),
        device="cpu",
        batch_tokens=64,
        own_process=True,
        threads=1,
        hang_timeout_s=8.0,
    )
    teacher = hosted_embedded_teacher(config, request=SampledRequest(), log=LOGS / "teacher.log")
    rollouts = [synthetic_rollout(5, 40, seed) for seed in range(600)]
    expected = scores_of(here, rollouts)
    with pytest.raises(EngineError, match="start it first"):
        _ = teacher.teacher_id

    async def strike_under_way() -> list[Any]:
        parts = (jobs_of(rollouts), jobs_of(rollouts[:9]))
        calls = [asyncio.create_task(teacher.score(part)) for part in parts]
        await asyncio.sleep(0.05)
        strike(pid_of(teacher))
        return [score for call in calls for score in await call]

    try:
        run(teacher.start())
        assert teacher.teacher_id == here.teacher_id
        assert teacher.identity == here.identity
        scores = run(strike_under_way())
        for score, wanted in zip(scores, [*expected, *expected[:9]], strict=True):
            assert np.array_equal(score.logprobs, wanted.logprobs)
        assert teacher.counters == {"score/server_restarts": 1}
        with pytest.raises(DataError, match="context"):  # not a death: it is not tried again
            run(teacher.score(jobs_of([synthetic_rollout(200, CONTEXT_LENGTH)])))
    finally:
        run(teacher.close())


# --- Steps --------------------------------------------------------------------------------------


@STRIKES
def test_a_lost_learner_goes_on_from_its_state_as_the_one_here(
    tiny_models: TinyModels, tmp_path: Path, strike: Strike
) -> None:
    settings = LearnerSettings(
        model_dir=tiny_models.student,
        training=EmbeddedTraining(
            kind="embedded", device="cpu", own_process=True, threads=1, hang_timeout_s=8.0
        ),
        objective=SampledReverseKL(kind="sampled_reverse_kl"),
        total_steps=10,
        seed=0,
    )
    here = build_embedded_learner(settings)
    learner = hosted_embedded_learner(settings, log=LOGS / "learner.log")
    teacher = EmbeddedTeacher(
        tiny_models.teacher,
        request=SampledRequest(),
        device="cpu",
        dtype="float32",
        batch_tokens=4096,
        chunk_tokens=1024,
    )
    rollouts = [synthetic_rollout(5, 40, seed, version=here.version) for seed in range(800)]
    scores = scores_of(teacher, rollouts)
    scored = [ScoredRollout(rollout=r, score=s) for r, s in zip(rollouts, scores, strict=True)]
    batch, long = Batch.uniform(scored[:40]), Batch.uniform(scored)

    async def strike_under_way() -> None:
        updating = asyncio.create_task(learner.update(long))  # still steps when it is struck
        await asyncio.sleep(0.02)
        strike(pid_of(learner))
        await updating

    try:
        run(learner.start())
        assert learner.version == here.version
        assert run(learner.update(batch)) == run(here.update(batch))
        run(learner.save_state(tmp_path))
        with pytest.raises(LearnerLost):
            run(strike_under_way())
        run(learner.start())
        assert learner.version.step == 0
        run(learner.load_state(tmp_path, here.version))
        assert run(learner.update(batch)) == run(here.update(batch))
        for channel in (MemoryChannel(), DirectoryChannel(tmp_path / "channel")):
            assert run(learner.publish(channel)) == here.version
            fetched = channel.fetch(here.version).tensors
            assert all(torch.equal(fetched[n], t) for n, t in here.payload().tensors.items())
    finally:
        run(learner.close())
    with pytest.raises(EngineError, match="not running"):
        run(learner.update(batch))
