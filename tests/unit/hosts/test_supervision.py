"""Restarts, with an engine that is a counter."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from qwen3_distill.errors import EngineLost, EngineStartError
from qwen3_distill.hosts.supervision import Restarts

DIED = EngineLost("the engine died")


class Engine:
    """Notes what is done with it; the starts in ``fails`` fail."""

    def __init__(self, limit: int, fails: tuple[int, ...] = ()) -> None:
        self.events: list[str] = []
        self._fails = fails
        self.restarts = Restarts(
            start=self._start, end=self._noting("end"), restore=self._noting("restore"), limit=limit
        )

    def _noting(self, event: str) -> Callable[[], Awaitable[None]]:
        async def note() -> None:
            await asyncio.sleep(0)
            self.events.append(event)

        return note

    async def _start(self) -> None:
        self.events.append("start")
        if self.events.count("start") in self._fails:
            raise EngineStartError("the engine does not start")


def test_all_who_saw_one_death_get_one_restart() -> None:
    async def run() -> None:
        engine = Engine(limit=1)
        await engine.restarts.start()
        seen = await engine.restarts.current()
        await asyncio.gather(*(engine.restarts.recover(seen, DIED) for _ in range(3)))
        assert engine.events == ["start", "end", "start", "restore"]
        assert engine.restarts.count == 1
        with pytest.raises(EngineLost, match="the engine died"):
            await engine.restarts.recover(await engine.restarts.current(), DIED)

    asyncio.run(run())


def test_a_restart_that_fails_is_tried_again_as_often_as_the_limit_allows() -> None:
    async def run() -> None:
        engine = Engine(limit=2, fails=(2,))
        await engine.restarts.start()
        await engine.restarts.recover(1, DIED)
        assert engine.events == ["start", "end", "start", "end", "end", "start", "restore"]
        given_up = Engine(limit=2, fails=(2, 3))
        await given_up.restarts.start()
        with pytest.raises(EngineStartError, match="does not start"):
            await given_up.restarts.recover(1, DIED)

    asyncio.run(run())


def test_what_was_closed_is_not_started_again() -> None:
    async def run() -> None:
        engine = Engine(limit=5)
        await engine.restarts.start()
        await engine.restarts.close()
        with pytest.raises(EngineLost):
            await engine.restarts.recover(1, DIED)
        assert engine.events == ["start", "end"]

    asyncio.run(run())


def test_an_engine_without_a_state_is_only_started_again() -> None:
    async def run() -> None:
        events: list[str] = []

        async def note() -> None:
            events.append("called")

        restarts = Restarts(start=note, end=note, limit=1)
        await restarts.start()
        await restarts.recover(1, DIED)
        assert (events, restarts.count) == (["called"] * 3, 1)

    asyncio.run(run())
