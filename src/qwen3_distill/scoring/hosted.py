"""A teacher in a host, as the controller sees it; the same code for every engine.

A worker that dies or hangs is started again and scores its unanswered requests anew: a score
depends on nothing but the tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_distill.errors import EngineError, EngineLost, EngineStartError
from qwen3_distill.hosts.host import Host
from qwen3_distill.hosts.opening import Opening
from qwen3_distill.hosts.supervision import Restarts
from qwen3_distill.types import (
    ModelIdentity,
    ScoreFailure,
    ScoreResult,
    ScoringJob,
    TeacherScore,
)
from qwen3_distill.utils.concurrency import forever


class HostedTeacher:
    """A `TeacherScorer` whose worker serves one.

    Args:
        host: runs the worker.
        opening: opens the teacher in it; its result is the teacher's id.
        max_restarts: how often the worker may die and be started again.
    """

    def __init__(
        self, host: Host, opening: Opening, *, identity: ModelIdentity, max_restarts: int
    ) -> None:
        self._host = host
        self._opening = opening
        self._identity = identity
        self._teacher_id: str | None = None
        self._restarts = Restarts(start=self._start, end=host.close, limit=max_restarts)

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @property
    def teacher_id(self) -> str:
        """Read from the weights in use, so there is none before `start`."""
        if self._teacher_id is None:
            raise EngineError("the teacher's weights are not loaded yet: start it first")
        return self._teacher_id

    @property
    def counters(self) -> Mapping[str, float]:
        return {"score/server_restarts": self._restarts.count}

    @property
    def max_dropped_fraction(self) -> float:
        return 0.0

    @property
    def starts_first(self) -> bool:
        return False

    async def memory_taken(self) -> None:
        await forever()

    @property
    def host(self) -> Host:
        return self._host

    async def start(self) -> None:
        """Start the worker and load the teacher in it.

        Raises:
            EngineStartError: it does not start.
        """
        await self._restarts.start()

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        return checked_results(await self._ask("score", list(jobs)), jobs)

    async def close(self) -> None:
        await self._restarts.close()

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the worker; repeat the call after each death."""
        while True:
            start = await self._restarts.current()
            try:
                return await self._host.call(method, *arguments)
            except EngineLost as error:
                await self._restarts.recover(start, error)

    async def _start(self) -> None:
        try:
            await self._host.start(self._opening.environment())
            self._teacher_id = await self._opening.open(self._host)
        except EngineStartError as error:
            raise self._opening.explained(error, self._host) from None


def checked_results(results: Any, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
    """Return a worker's results if they are one a job, each with a value for every scored token.

    Raises:
        EngineError: they are something else.
    """
    if not isinstance(results, list) or len(results) != len(jobs):
        raise EngineError(f"the teacher's worker gave no list of {len(jobs)} scores")
    for result, job in zip(results, jobs, strict=True):
        if isinstance(result, ScoreFailure):
            continue
        expected = sum(span.stop - span.start for span in job.scored)
        if not isinstance(result, TeacherScore) or result.logprobs.shape != (expected,):
            raise EngineError(
                f"the teacher's worker gave no score of {expected} tokens for {job.rollout_id}"
            )
    return results
