"""A served teacher in a host, as the controller makes it: its server runs where the host is."""

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

from qwen3_distill.config import ServedScoring
from qwen3_distill.hosts.host import MakeHost, WorkerSpec
from qwen3_distill.hosts.opening import Opening
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.scoring.hosted import HostedTeacher, checked_results
from qwen3_distill.scoring.served.wire import Wire
from qwen3_distill.types import Rollout, RolloutRequest, ScoreResult, ScoringJob


class HostedServedTeacher(HostedTeacher):
    """A `TeacherScorer` whose worker runs a `ServedTeacher`, with the settings of one.

    Args:
        wire: the interface of its server.
        module: the worker's, as ``python -m`` takes it.
        opening: what the worker makes its teacher of.
        log: file that takes the worker's and the server's output.
        make_host: where the worker runs.
    """

    def __init__(
        self,
        config: ServedScoring,
        wire: Wire,
        *,
        module: str,
        opening: Opening,
        make_host: MakeHost,
        log: Path,
    ) -> None:
        spec = WorkerSpec(
            name=f"{wire.engine} teacher",
            module=module,
            log=log,
            start_timeout_s=config.start_timeout_s,
        )
        super().__init__(
            make_host(spec),
            opening,
            identity=load_identity(config.model),
            max_restarts=config.max_restarts,
        )
        self._config = config
        self._wire = wire
        self._worker_counters: Mapping[str, float] = {}

    @property
    def counters(self) -> Mapping[str, float]:
        return {**self._worker_counters, **super().counters}

    @property
    def max_dropped_fraction(self) -> float:
        return self._config.max_dropped_fraction

    @property
    def starts_first(self) -> bool:
        return self._wire.starts_first

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        results, self._worker_counters = await self._ask("score", list(jobs))
        return checked_results(results, jobs)

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout, None]:
        """Answer as the teacher (see `Sampler.generate`)."""
        stream = self.host.stream("sample", list(requests))
        async with contextlib.aclosing(stream):
            async for rollout in stream:
                yield rollout
