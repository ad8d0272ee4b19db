"""The SGLang teacher in a host, as the controller makes it: its server runs where the host is."""

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

from qwen3_distill.config import SglangScoring
from qwen3_distill.hosts.host import MakeHost, WorkerSpec
from qwen3_distill.hosts.opening import Opening
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.scoring.hosted import HostedTeacher, checked_results
from qwen3_distill.scoring.sglang.server import MemoryFraction
from qwen3_distill.types import Rollout, RolloutRequest, ScoreRequest, ScoreResult, ScoringJob

_MODULE = "qwen3_distill.scoring.sglang.worker"


class HostedSglangTeacher(HostedTeacher):
    """A `TeacherScorer` whose worker runs an `SglangTeacher`, with the settings of one."""

    def __init__(self, config: SglangScoring, *, opening: Opening, make_host: MakeHost, log: Path):
        spec = WorkerSpec(
            name="SGLang teacher",
            module=_MODULE,
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
        self._worker_counters: Mapping[str, float] = {}

    @property
    def counters(self) -> Mapping[str, float]:
        return {**self._worker_counters, **super().counters}

    @property
    def max_dropped_fraction(self) -> float:
        return self._config.max_dropped_fraction

    @property
    def starts_first(self) -> bool:
        return True

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        results, self._worker_counters = await self._ask("score", list(jobs))
        return checked_results(results, jobs)

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncGenerator[Rollout, None]:
        """Answer as the teacher (see `Sampler.generate`)."""
        stream = self.host.stream("sample", list(requests))
        async with contextlib.aclosing(stream):
            async for rollout in stream:
                yield rollout


def hosted_sglang_teacher(
    config: SglangScoring,
    *,
    request: ScoreRequest,
    memory_fraction: MemoryFraction,
    max_total_tokens: int | None,
    log: Path,
    make_host: MakeHost,
) -> HostedSglangTeacher:
    """Make a `TeacherScorer` whose worker starts an SGLang server next to it.

    Args:
        request: what the objective needs.
        memory_fraction: see `MemoryFraction`; a callable must be importable by name.
        max_total_tokens: of the server; None: SGLang's default.
        log: file that takes the worker's and the server's output.
        make_host: where the worker runs.
    """
    opening = Opening(
        config,
        request,
        memory_fraction,
        max_total_tokens,
        timeout_s=config.start_timeout_s,
    )
    return HostedSglangTeacher(config, opening=opening, make_host=make_host, log=log)
