"""A teacher that stands in front of another one."""

from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from qwen3_distill.ports import TeacherScorer
from qwen3_distill.types import ModelIdentity, ScoreResult, ScoringJob

Inner = TypeVar("Inner", bound=TeacherScorer)


class TeacherWrapper(Generic[Inner]):
    """A `TeacherScorer` that passes everything on to the inner one.

    A subclass changes what it is for: it keeps scores, or changes the weights.
    """

    def __init__(self, inner: Inner) -> None:
        self.inner = inner

    @property
    def identity(self) -> ModelIdentity:
        return self.inner.identity

    @property
    def teacher_id(self) -> str:
        return self.inner.teacher_id

    @property
    def counters(self) -> Mapping[str, float]:
        return self.inner.counters

    @property
    def max_dropped_fraction(self) -> float:
        return self.inner.max_dropped_fraction

    @property
    def starts_first(self) -> bool:
        return self.inner.starts_first

    async def memory_taken(self) -> None:
        await self.inner.memory_taken()

    async def start(self) -> None:
        await self.inner.start()

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        return await self.inner.score(jobs)

    async def close(self) -> None:
        await self.inner.close()
