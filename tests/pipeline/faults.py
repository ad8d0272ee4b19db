"""Wrappers of engines that fail once, in the middle of a call."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.types import (
    Batch,
    Rollout,
    RolloutRequest,
    ScoreResult,
    ScoringJob,
    Update,
)

Strike = Callable[[], None]
_INTO_THE_CALL_S = 0.02


class _Struck:
    """Passes every call on to the engine, and strikes in the call that the countdown ends at."""

    def __init__(self, part: Any, calls_before: int, strike: Strike) -> None:
        self._part = part
        self._calls_left = calls_before + 1
        self._strike = strike

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def _is_due(self) -> bool:
        self._calls_left -= 1
        return self._calls_left == 0

    async def _under_way(self, method: str, argument: Any) -> Any:
        """Make a call; if it is due, strike soon after it began."""
        working = asyncio.create_task(getattr(self._part, method)(argument))
        if self._is_due():
            await asyncio.sleep(_INTO_THE_CALL_S)
            self._strike()
        return await working


class StruckEngine(_Struck):
    """Struck after the first rollout of a call."""

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        due = self._is_due()
        async for rollout in self._part.generate(requests):
            yield rollout
            if due:
                due = False
                self._strike()


class StruckTeacher(_Struck):
    """Struck during a call of `score`."""

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        return await self._under_way("score", jobs)


class StruckLearner(_Struck):
    """Struck during an optimizer step."""

    async def update(self, batch: Batch) -> Update:
        return await self._under_way("update", batch)


def struck(parts: Parts, *, engine: Strike, teacher: Strike, learner: Strike) -> Parts:
    """The engine is struck in step 1, the teacher in step 3, the learner in step 4."""
    fakes: dict[str, Any] = {
        "engine": StruckEngine(parts.engine, 1, engine),
        "teacher": StruckTeacher(parts.required_teacher, 3, teacher),
        "learner": StruckLearner(parts.learner, 4, learner),
    }
    return replace(parts, **fakes)
