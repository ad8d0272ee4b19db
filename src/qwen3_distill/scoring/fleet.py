"""Several teachers behind one port, wherever each of them runs.

A job goes to the teacher with the fewest outstanding tokens. A score depends on nothing but the
tokens, so when a teacher dies its jobs are scored by another one. All must be the same teacher:
their ids, which name the weights' digest and the precision, are compared after every start.
"""

from collections.abc import Callable, Mapping, Sequence

from qwen3_distill.errors import EngineError, EngineLost, HandshakeError
from qwen3_distill.hosts.fleet_state import FleetState
from qwen3_distill.hosts.members import Members, Span, no_span
from qwen3_distill.hosts.routing import OutstandingTokens
from qwen3_distill.ports import TeacherScorer
from qwen3_distill.scoring.handshake import check_lengths
from qwen3_distill.types import ModelIdentity, ScoreResult, ScoringJob
from qwen3_distill.utils.concurrency import together


class TeacherFleet:
    """A `TeacherScorer` over several of the same weights.

    Args:
        teachers: the members; none restarts itself.
        max_restarts: how often each may be started again.
        minimum: with fewer teachers left, the fleet fails.
        warn: told of every loss.
    """

    def __init__(
        self,
        teachers: Sequence[TeacherScorer],
        *,
        max_restarts: int,
        minimum: int = 1,
        warn: Callable[[str], None],
    ) -> None:
        self._state = FleetState(len(teachers), max_restarts=max_restarts, minimum=minimum)
        self._members = Members("teacher", teachers, self._state, verify=self._verify, warn=warn)
        self._outstanding = OutstandingTokens(len(teachers))
        self._teacher_id: str | None = None
        self._tokens_scored = [0] * len(teachers)
        self.span: Span = no_span
        """Records that a teacher works; set by the run's recorder."""

    @property
    def teachers(self) -> tuple[TeacherScorer, ...]:
        return self._members.engines

    @property
    def state(self) -> FleetState:
        return self._state

    def tell(self, say: Callable[[str], None]) -> None:
        """Tell ``say`` whenever nothing serves, and what is waited for."""
        self._members.say = say

    @property
    def awaited(self) -> str:
        """The teachers that do not serve, in words; empty if all do."""
        return self._members.awaited

    @property
    def identity(self) -> ModelIdentity:
        return self.teachers[0].identity

    @property
    def teacher_id(self) -> str:
        """The id that all members have; there is none before `start`."""
        if self._teacher_id is None:
            raise EngineError("the teacher's weights are not loaded yet: start it first")
        return self._teacher_id

    @property
    def counters(self) -> Mapping[str, float]:
        """Restarts, the sums of the members' own counters, and figures per teacher."""
        found: dict[str, float] = {}
        for teacher in self.teachers:
            for key, value in teacher.counters.items():
                found[key] = found.get(key, 0.0) + value
        found["score/server_restarts"] = self._state.num_restarts
        found["fleet/teachers_serving"] = len(self._state.serving)
        for i in range(len(self.teachers)):
            found[f"fleet/teacher_{i}_tokens"] = self._tokens_scored[i]
            found[f"fleet/teacher_{i}_restarts"] = self._state.restarts_of(i)
            found[f"fleet/teacher_{i}_queue_tokens"] = self._outstanding.of(i)
        return found

    @property
    def max_dropped_fraction(self) -> float:
        return self.teachers[0].max_dropped_fraction

    @property
    def starts_first(self) -> bool:
        return any(teacher.starts_first for teacher in self.teachers)

    async def memory_taken(self) -> None:
        await together(*(one.memory_taken() for one in self.teachers if one.starts_first))

    async def start(self) -> None:
        """Start all teachers and compare their ids.

        Raises:
            EngineStartError: none starts.
            HandshakeError: one is another teacher.
        """
        await self._members.start()

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        check_lengths(jobs, self.identity)
        results: dict[int, ScoreResult] = {}
        pending = list(range(len(jobs)))
        while pending:
            serving = await self._members.serving()
            if not serving:
                raise EngineError("no teacher of the fleet serves")
            shares: dict[int, list[int]] = {}
            for index in pending:
                teacher = self._outstanding.least(serving)
                shares.setdefault(teacher, []).append(index)
                self._outstanding.add(teacher, int(jobs[index].token_ids.size))
            await together(
                *(self._score(teacher, share, jobs, results) for teacher, share in shares.items())
            )
            pending = [index for index in pending if index not in results]
        return [results[index] for index in range(len(jobs))]

    async def close(self) -> None:
        await self._members.close()

    async def _score(
        self,
        teacher: int,
        share: Sequence[int],
        jobs: Sequence[ScoringJob],
        results: dict[int, ScoreResult],
    ) -> None:
        """Put a teacher's scores into ``results``; nothing if it is lost."""
        start = self._state.start_of(teacher)
        tokens = sum(int(jobs[index].token_ids.size) for index in share)
        try:
            with self.span(f"teacher_{teacher}", f"{len(share)} jobs"):
                answers = await self.teachers[teacher].score([jobs[index] for index in share])
        except EngineLost as error:
            self._members.report_lost(teacher, start, error)
        else:
            results.update(zip(share, answers, strict=True))
            self._tokens_scored[teacher] += tokens
        finally:
            self._outstanding.remove(teacher, tokens)

    async def _verify(self, index: int, start: int) -> None:
        """Let a teacher serve if it is the same one as the others."""
        found = self.teachers[index].teacher_id
        if self._teacher_id is None:
            self._teacher_id = found
        if found != self._teacher_id:
            raise HandshakeError(
                f"teacher {index} of the fleet is {found}, the others are {self._teacher_id}: they "
                "would score differently; give all nodes the same files under scoring.model"
            )
        self._state.verified(index, start)
        self._members.notify()
