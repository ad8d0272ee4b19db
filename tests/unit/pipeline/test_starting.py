"""What is said while engines start."""

import asyncio

import pytest

from qwen3_distill.errors import EngineStartError
from qwen3_distill.pipeline import starting
from qwen3_distill.pipeline.starting import start_engines
from qwen3_distill.utils.concurrency import Work


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "_INTERVAL_S", 0.02)


def lasting(seconds: float) -> Work:
    return lambda: asyncio.sleep(seconds)


def test_each_engine_is_named_with_its_time() -> None:
    said: list[str] = []
    starts = {"the teacher": lasting(0.3), "the learner": lasting(0.05)}
    asyncio.run(start_engines(starts, said.append))
    assert said[0] == "starting the teacher, the learner"
    assert said[1].startswith("starting the teacher (0.")
    assert ", the learner (0." in said[1]
    assert said[-1].startswith("starting the teacher (0.")
    assert "; started: the learner after 0." in said[-1]


def test_engines_that_are_there_at_once_are_named_once() -> None:
    said: list[str] = []
    asyncio.run(start_engines({"the teacher": lasting(0)}, said.append))
    assert said == ["starting the teacher"]


def test_a_failure_ends_the_others_and_the_messages() -> None:
    said: list[str] = []
    ended: list[str] = []

    async def fail() -> None:
        await asyncio.sleep(0.05)
        raise EngineStartError("no memory")

    async def start() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    async def work() -> int:
        with pytest.raises(EngineStartError, match="no memory"):
            await start_engines({"one": fail, "other": start}, said.append)
        count = len(said)
        await asyncio.sleep(0.1)
        return len(said) - count

    assert asyncio.run(work()) == 0
    assert ended == ["cancelled"]


def test_engines_that_wait_for_others_are_named_once_they_begin() -> None:
    said: list[str] = []
    first = {"the teacher": lasting(0.3)}
    then = {"the learner": lasting(0.3)}
    asyncio.run(start_engines(first, said.append, then=then, after=lasting(0.15)))
    assert said[0] == "starting the teacher"
    assert said[1].startswith("starting the teacher (0.0")
    assert "the learner" not in said[1]
    assert any("the teacher (" in text and "the learner (" in text for text in said)
    assert said[-1].startswith("starting the learner (")
    assert "; started: the teacher after 0.3" in said[-1]


def test_engines_begin_at_the_latest_when_those_before_have_started() -> None:
    seen: list[str] = []

    def noting(name: str) -> Work:
        async def start() -> None:
            seen.append(f"{name} begins")
            await asyncio.sleep(0.05)
            seen.append(f"{name} is there")

        return start

    work = start_engines({"one": noting("one")}, print, then={"other": noting("other")})
    asyncio.run(work)
    assert seen == ["one begins", "one is there", "other begins", "other is there"]
