"""The interface of a kind of server: what it is asked, and how its replies are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from qwen3_distill.scoring.served.faults import Fault
from qwen3_distill.types import (
    Rollout,
    RolloutRequest,
    ScoreRequest,
    ScoringJob,
    TeacherScore,
    WeightVersion,
)


class MakeScoreBody(Protocol):
    """Writes a request for the logprobs of some jobs; the temperature must not matter."""

    def __call__(
        self, jobs: Sequence[ScoringJob], request: ScoreRequest, *, temperature: float = 1.0
    ) -> bytes: ...


class ReadScores(Protocol):
    """Reads one score or fault per job, in the order sent; raises `ReplyError` for a bad reply."""

    def __call__(
        self,
        reply: bytes,
        jobs: Sequence[ScoringJob],
        request: ScoreRequest,
        *,
        vocab_size: int,
        teacher_id: str,
        on_cached: Callable[[int], None] = ...,
    ) -> list[TeacherScore | Fault]: ...


class ReadAnswer(Protocol):
    """Reads a sampled answer as a rollout; raises `ReplyError` if it is not a complete one."""

    def __call__(
        self,
        reply: bytes,
        request: RolloutRequest,
        eos_ids: frozenset[int],
        version: WeightVersion,
        *,
        vocab_size: int,
    ) -> Rollout: ...


@dataclass(frozen=True, kw_only=True)
class Wire:
    """The interface of a kind of server."""

    kind: str
    """The value of ``scoring.kind``, also in a teacher's id."""
    engine: str
    """The server's name in errors."""
    path: str
    """Where requests are posted."""
    reads_cache: bool = False
    """Whether a server takes a context that it has in its cache from there."""
    max_jobs: int | None = None
    """Jobs that a request may hold; None: any number."""
    score_body: MakeScoreBody
    score_reply_limit: Callable[[Sequence[ScoringJob], ScoreRequest], int]
    """Bytes of the largest possible reply to a scoring request."""
    read_scores: ReadScores
    answer_body: Callable[[RolloutRequest, frozenset[int], int], bytes]
    answer_reply_limit: Callable[[RolloutRequest], int]
    """Bytes of the largest possible reply to a sampling request."""
    read_answer: ReadAnswer
    remedy: Callable[[ScoreRequest], str] = lambda probe: ""
    """Ends the error of a server that refused its first request: how else to start it."""
    sampling_probe: RolloutRequest | None = None
    """A request whose sampled tokens all have probability 1: a server whose logprobs say otherwise
    gives those of another distribution. None: servers of this kind need no such check."""
    sampling_remedy: str = ""
    """How else to start such a server."""
    settle_path: str | None = None
    """Where a server that is started here is told, once it answers, that its start is over; None:
    it need not be told. What it answers does not matter."""
    starts_first: bool = False
    """Whether a server takes a share of the memory that is free when it starts."""
