"""Engines with one planted fault each, around real embedded engines. For tests of the doctor."""

import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from qwen3_distill.errors import WeightVersionError
from qwen3_distill.ports import WeightChannel
from qwen3_distill.types import (
    FinishReason,
    Rollout,
    RolloutRequest,
    ScoreFailure,
    ScoreResult,
    ScoringJob,
    TeacherScore,
    WeightVersion,
)

LEFT: list[subprocess.Popen[bytes]] = []
"""Processes of `LeavesProcess`; the test ends them."""


class Around:
    """Hands everything on to the engine inside, but what a subclass replaces."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class OtherTemperature(Around):
    """Samples at temperature 0.7 whatever is asked for, and gives the logprobs of that."""

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        asked = {request.rollout_id: request.sampling for request in requests}
        colder = [
            replace(request, sampling=replace(request.sampling, temperature=0.7))
            for request in requests
        ]
        async for rollout in self.inner.generate(colder):
            yield replace(rollout, sampling=asked[rollout.rollout_id])


class Stale(Around):
    """Keeps the first weights, and says that it serves the newest."""

    said: WeightVersion | None = None

    @property
    def version(self) -> WeightVersion:
        return self.said or self.inner.version

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        if self.said is None:
            await self.inner.load(version, channel)
        self.said = version

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        async for rollout in self.inner.generate(requests):
            spans = tuple(replace(span, version=self.version) for span in rollout.versions)
            yield replace(rollout, versions=spans)


class OtherWeights(Around):
    """Reads back another digest than that of the weights it was given."""

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        raise WeightVersionError(f"the weights in use are not {version}; start the run again")


class NeverStops(Around):
    """Cuts no rollout at its end-of-sequence token."""

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        async for rollout in self.inner.generate(requests):
            yield replace(rollout, finish_reason=FinishReason.LENGTH)


class BatchDependent(Around):
    """Gives other scores to jobs that come together."""

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        results = await self.inner.score(jobs)
        if len(jobs) == 1:
            return results
        return [replace(result, logprobs=result.logprobs - 0.05) for result in results]


class Forgetful(Around):
    """Gives no score to one job of several."""

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        results = await self.inner.score(jobs)
        failure = ScoreFailure(rollout_id=jobs[0].rollout_id, reason="made up")
        return [failure, *results[1:]] if len(jobs) > 1 else results


class Plain(Around):
    """Gives no candidates, though they are asked for."""

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        return [
            TeacherScore(teacher_id=result.teacher_id, logprobs=result.logprobs)
            for result in await self.inner.score(jobs)
        ]


class LeavesProcess(Around):
    """Starts a process and does not end it."""

    async def start(self) -> None:
        await self.inner.start()
        LEFT.append(subprocess.Popen(["sleep", "600"]))


class OtherStep(Around):
    """Publishes its first weights under every version's name: the step never reaches the engine."""

    async def publish(self, channel: WeightChannel) -> WeightVersion:
        version = await self.inner.publish(channel)
        if version.step:
            raise WeightVersionError(f"{version} is not in the channel; start the run again")
        return version
