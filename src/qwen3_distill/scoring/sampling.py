"""Rollouts that the teacher samples."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from typing import TypeAlias

from qwen3_distill.errors import EngineError
from qwen3_distill.ports import Sampler, TeacherScorer
from qwen3_distill.types import Rollout, RolloutRequest, WeightVersion

OpenSampler: TypeAlias = Callable[[], AbstractAsyncContextManager[Sampler]]


class TeacherSampler:
    """A `Sampler` whose rollouts carry the teacher's name instead of versions of the student.

    Args:
        teacher: the scorer, whose weights must be those that sample.
        open_sampler: opens the engine that samples; its rollouts name the weights in use.
    """

    def __init__(self, teacher: TeacherScorer, open_sampler: OpenSampler) -> None:
        self._teacher = teacher
        self._open_sampler = open_sampler
        self._open = AsyncExitStack()
        self._sampler: Sampler | None = None

    async def start(self) -> None:
        """Open the engine. The teacher must have been started."""
        self._sampler = await self._open.enter_async_context(self._open_sampler())

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        """See `Sampler.generate`.

        Raises:
            EngineError: other weights than the teacher's sampled.
        """
        if self._sampler is None:
            raise EngineError("the teacher's sampler is not open: start it first")
        async for rollout in self._sampler.generate(requests):
            for span in rollout.versions:
                self._check(span.version)
            yield replace(rollout, versions=(), teacher_id=self._teacher.teacher_id)

    async def close(self) -> None:
        self._sampler = None
        await self._open.aclose()

    def _check(self, version: WeightVersion) -> None:
        if f"#{version.digest}@" not in self._teacher.teacher_id:
            raise EngineError(
                f"the sampled weights have digest {version.digest}, but the teacher that scores is "
                f"{self._teacher.teacher_id}: its model directory was changed during the run"
            )
