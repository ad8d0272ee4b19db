"""Records that cross package boundaries. Imports numpy only: no torch, no engine.

Alignment, once for the whole project: per-token arrays are *target-aligned over the sampled
tokens*. Index s describes sampled token s of the response, given the prompt and every response
token before it. Where the student sampled the whole response, s is also the index into
``response_ids``. A response token that was not sampled (a tool's answer) has no logprob, no score
and no loss.

Log-probabilities are natural logarithms (nats), float32. Nothing here is padded or shifted; both
happen in exactly one place, ``training/batching.py``.

Shape letters: R response tokens of one rollout, S of them sampled, P spans of them, J tokens of a
scoring job, K teacher candidates per token, D hidden size of the teacher, N rollouts of a batch.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qwen3_distill.errors import AlignmentError, DataError

IntArray: TypeAlias = NDArray[np.integer[Any]]
"""Accepted in any integer type, stored as int32."""
FloatArray: TypeAlias = NDArray[np.floating[Any]]
"""Accepted in any float type, stored as float32."""

LOGPROB_SLACK_NATS = 1e-3
"""How far above 0 a logprob may lie before it is an error, because engines round."""


def _frozen_array(values: Any, dtype: type[np.generic], ndim: int, what: str) -> NDArray[Any]:
    array = np.array(values, dtype=dtype)  # a copy: a record never shares memory with its maker
    if array.ndim != ndim:
        raise AlignmentError(f"{what} has {array.ndim} axes, expected {ndim}")
    array.setflags(write=False)
    return array


def _checked_ids(values: Any, ndim: int, what: str) -> IntArray:
    array = _frozen_array(values, np.int32, ndim, what)
    if array.size and int(array.min()) < 0:
        raise AlignmentError(f"{what}: {int(array.min())} is no token id, expected 0 or more")
    return array


def _checked_logprobs(values: Any, ndim: int, what: str) -> FloatArray:
    array = _frozen_array(values, np.float32, ndim, what)
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise AlignmentError(
            f"{what}: {bad} of {array.size} values are not finite. A missing logprob must be "
            "retried or the rollout dropped; it never becomes a number."
        )
    if array.size and float(array.max()) > LOGPROB_SLACK_NATS:
        raise AlignmentError(
            f"{what}: {float(array.max()):.4f} nats is not a log-probability (> 0)"
        )
    return array


def _check_spans(spans: "Sequence[TokenSpan]", first: int, stop: int, what: str) -> None:
    """Raise unless spans are in order, apart, not empty and within ``[first, stop)``."""
    edges = [edge for span in spans for edge in (span.start, span.stop)]
    is_increasing = all(a < b for a, b in itertools.pairwise(edges))
    if not edges or not is_increasing or edges[0] < first or edges[-1] > stop:
        raise AlignmentError(
            f"{what}: spans {[(s.start, s.stop) for s in spans]}, expected at least one, in order, "
            f"with a gap between any two, none empty, all within [{first}, {stop})"
        )


def _checked_candidates(given: IntArray, num_tokens: int, what: str) -> IntArray:
    """Return [S, K] candidates as a frozen array; raise unless there are K >= 1 distinct ones."""
    ids = _checked_ids(given, 2, f"{what}: candidate_ids")
    if len(ids) != num_tokens or ids.shape[1] < 1:
        raise AlignmentError(
            f"{what}: candidate_ids {ids.shape}, expected [{num_tokens}, K >= 1]: a row for every "
            "sampled token"
        )
    _check_distinct(ids, what)
    return ids


def _check_distinct(ids_SK: IntArray, what: str) -> None:
    in_order = np.sort(ids_SK, axis=1)
    twice = (in_order[:, 1:] == in_order[:, :-1]).any(axis=1)
    if twice.any():
        raise AlignmentError(
            f"{what}: candidate_ids of scored token {int(twice.argmax())} has an id twice, "
            "expected distinct ones"
        )


class FinishReason(str, Enum):
    """Why a rollout ended."""

    STOP = "stop"
    """The student sampled an end-of-sequence token; it is the last response token."""
    LENGTH = "length"
    """Cut at ``max_new_tokens``. No end-of-sequence token was sampled and none is added."""
    HARVESTED = "harvested"
    """A piece of a rollout that was still being sampled; another piece continues it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt, rendered once with the student's chat template.

    Example:
        >>> Prompt(
        ...     prompt_id="train.jsonl:17",
        ...     token_ids=np.array([151644, 872, 198]),
        ...     task_data={"answer": "42"},
        ... )
    """

    prompt_id: str
    """Permanent name, e.g. ``"train.jsonl:17"``."""
    token_ids: IntArray
    task_data: Mapping[str, str] = field(default_factory=dict)
    """Input of the verifier, e.g. ``{"answer": "42"}``; where there are several teachers the tag,
    too (``data/tags.py``)."""
    teacher_ids: IntArray | None = None
    """Tokens for the teacher in place of ``token_ids`` (``scoring.context``); None: the same."""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content) of each turn, before the chat template: a teacher with a template of its own
    renders them. Empty where they are not known, as in a rollout file."""

    def __post_init__(self) -> None:
        for name in ("token_ids", "teacher_ids"):
            given = getattr(self, name)
            if given is None:
                continue
            ids = _checked_ids(given, 1, f"prompt {self.prompt_id}: {name}")
            if ids.size == 0:
                raise DataError(f"prompt {self.prompt_id} has no tokens in {name}")
            object.__setattr__(self, name, ids)
        object.__setattr__(self, "task_data", MappingProxyType(dict(self.task_data)))

    def followed_by(self, response_ids: IntArray) -> "Prompt":
        """Return the prompt of a piece: response tokens follow, for student and teacher alike."""
        teacher_ids = self.teacher_ids
        if teacher_ids is not None:
            teacher_ids = np.concatenate([teacher_ids, response_ids])
        return Prompt(
            prompt_id=self.prompt_id,
            token_ids=np.concatenate([self.token_ids, response_ids]),
            task_data=self.task_data,
            teacher_ids=teacher_ids,
            messages=self.messages,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a call: a read-only mapping has no pickle, and prompts go to processes."""
        values = {
            name: getattr(self, name)
            for name in ("prompt_id", "token_ids", "teacher_ids", "messages")
        }
        return _prompt_again, (values | {"task_data": dict(self.task_data)},)


def _prompt_again(values: dict[str, Any]) -> Prompt:
    return Prompt(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSpec:
    """Sampling settings of one rollout. With the weights they determine it."""

    temperature: float
    """0: greedy, always the most likely token. Only evaluations may be greedy."""
    top_p: float
    top_k: int
    """0: no limit."""
    max_new_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise DataError(
                f"temperature={self.temperature}: expected a positive number, or 0 for greedy"
            )
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p={self.top_p}: expected 0 < top_p <= 1")
        if self.top_k < 0 or self.max_new_tokens < 1 or self.seed < 0:
            raise DataError(
                f"top_k={self.top_k}, max_new_tokens={self.max_new_tokens}, seed={self.seed}: "
                "expected top_k >= 0, max_new_tokens >= 1, seed >= 0"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the most likely one; its behavior logprob is then 0 nats."""
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class WeightVersion:
    """Weights after ``step`` optimizer steps. The digest tells forks of one step apart."""

    step: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSpan:
    """Tokens ``[start, stop)`` of a sequence."""

    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionSpan:
    """States that sampled tokens ``[start, stop)`` of a rollout come from weights ``version``."""

    start: int
    stop: int
    version: WeightVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRequest:
    """A request to sample one response."""

    rollout_id: str
    prompt: Prompt
    sampling: SamplingSpec
    num_candidates: int = 0
    """K: how many of the most likely tokens to keep at every sampled one; 0: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One response, as sampled: token ids are never decoded and tokenized again.

    Example: the student sampled the first 3 and the last 2 tokens, and a tool wrote 2 between them;
    weights were updated before the last token.

        >>> Rollout(
        ...     rollout_id="step-000007/prompt-0000/sample-00",
        ...     prompt=prompt,
        ...     sampling=sampling,
        ...     response_ids=np.array([785, 4226, 374, 198, 220, 19, 17]),  # R = 7
        ...     sampled=(TokenSpan(start=0, stop=3), TokenSpan(start=5, stop=7)),
        ...     behavior_logprobs=np.array([-0.1, -2.3, -0.4, -1.2, -0.7]),  # S = 5
        ...     versions=(
        ...         VersionSpan(start=0, stop=4, version=step_6),  # the first 4 of the 5
        ...         VersionSpan(start=4, stop=5, version=step_7),
        ...     ),
        ...     finish_reason=FinishReason.LENGTH,
        ... )

    Raises:
        AlignmentError: lengths disagree, a logprob is not finite, the sampled spans are empty, out
            of order, without a gap between them or outside of the response, the version spans do
            not tile ``[0, S)``, or a teacher's answer has any; or a piece's teacher would not read
            the response tokens before the piece.
    """

    rollout_id: str
    prompt: Prompt
    sampling: SamplingSpec
    response_ids: IntArray
    """[R], R >= 1."""
    behavior_logprobs: FloatArray
    """[S] nats, under the distribution sampled from (after temperature, top-k and top-p). 0 where
    the sampling is greedy: that distribution has one token."""
    versions: tuple[VersionSpan, ...]
    """The student's weights: spans that tile ``[0, S)`` in order; more than one after an in-flight
    weight update. None where a teacher sampled: its weights have no place among the student's."""
    finish_reason: FinishReason
    continues_at: int = 0
    """Response tokens in earlier pieces of the rollout; ``prompt.token_ids`` ends with them."""
    sampled: tuple[TokenSpan, ...] = ()
    """Which response tokens were sampled. Left out: all of them, as one span."""
    teacher_id: str | None = None
    """The teacher that sampled the response, and whose logprobs `behavior_logprobs` are; None: the
    student did."""
    candidate_ids: IntArray | None = None
    """[S, K] the sampling model's most likely tokens at every sampled one, most likely first; None:
    the request asked for none. Files of rollouts leave them out: scores have them."""

    def __post_init__(self) -> None:
        what = f"rollout {self.rollout_id}"
        ids = _checked_ids(self.response_ids, 1, f"{what}: response_ids")
        logprobs = _checked_logprobs(self.behavior_logprobs, 1, f"{what}: behavior_logprobs")
        if ids.size == 0:
            raise AlignmentError(f"{what} has no response tokens")
        sampled = self.sampled or (TokenSpan(start=0, stop=int(ids.size)),)
        _check_spans(sampled, 0, int(ids.size), f"{what}: sampled")
        object.__setattr__(self, "sampled", tuple(sampled))
        if self.num_loss_tokens != logprobs.size:
            raise AlignmentError(
                f"{what}: {self.num_loss_tokens} response tokens were sampled, but there are "
                f"{logprobs.size} behavior logprobs"
            )
        edges = [0, *(span.stop for span in self.versions)]
        starts = [span.start for span in self.versions]
        if self.teacher_id is not None:
            if not self.teacher_id or self.versions:
                raise AlignmentError(
                    f"{what}: sampled by teacher {self.teacher_id!r} with {len(self.versions)} "
                    "version spans, expected the teacher's name and no weights of a student"
                )
        elif starts != edges[:-1] or edges[-1] != logprobs.size or edges != sorted(set(edges)):
            raise AlignmentError(
                f"{what}: version spans {[(s.start, s.stop) for s in self.versions]} do not tile "
                f"its {logprobs.size} sampled tokens"
            )
        self._check_teacher_ids()
        if self.candidate_ids is not None:
            candidates = _checked_candidates(self.candidate_ids, self.num_loss_tokens, what)
            object.__setattr__(self, "candidate_ids", candidates)
        object.__setattr__(self, "response_ids", ids)
        object.__setattr__(self, "behavior_logprobs", logprobs)

    def _check_teacher_ids(self) -> None:
        before, teacher_ids = self.continues_at, self.prompt.teacher_ids
        if not before or teacher_ids is None:
            return
        is_whole = teacher_ids.size > before and self.prompt.token_ids.size > before
        if not is_whole or (teacher_ids[-before:] != self.prompt.token_ids[-before:]).any():
            raise AlignmentError(
                f"rollout {self.rollout_id} continues at response token {before}, and what the "
                f"teacher reads does not end with the {before} tokens before it"
            )

    @property
    def num_tokens(self) -> int:
        """R: response tokens, sampled or not."""
        return int(self.response_ids.size)

    @property
    def num_loss_tokens(self) -> int:
        """S: sampled tokens. Only they have a logprob, a score and a gradient."""
        return sum(span.num_tokens for span in self.sampled)

    @property
    def sampled_indices(self) -> IntArray:
        """[S] indices into ``response_ids`` of the sampled tokens, in order."""
        return np.concatenate([np.arange(span.start, span.stop) for span in self.sampled])

    @property
    def is_whole(self) -> bool:
        """Whether this is a complete response, not a piece of one."""
        return self.continues_at == 0 and self.finish_reason is not FinishReason.HARVESTED

    @property
    def sampled_by(self) -> Literal["student", "teacher"]:
        """The model that sampled the response."""
        return "student" if self.teacher_id is None else "teacher"

    @property
    def oldest_version(self) -> WeightVersion | None:
        """Oldest weights of the student that sampled any of the tokens; they define the rollout's
        age. None where a teacher sampled: its answers do not age."""
        return min((span.version for span in self.versions), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutPrefix:
    """The tokens so far of a rollout that is still being sampled."""

    request: RolloutRequest
    response_ids: IntArray
    """[R] so far, R >= 1; all sampled."""
    behavior_logprobs: FloatArray
    """[R] nats."""
    versions: tuple[VersionSpan, ...]
    candidate_ids: IntArray | None = None
    """[R, K], as in `Rollout`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringJob:
    """Tokens for a teacher to score. A teacher needs to know nothing about rollouts.

    Example: a prompt of 3 tokens, then a response of which the first 2 and the last token count.

        >>> ScoringJob(
        ...     rollout_id="step-000007/prompt-0000/sample-00",
        ...     token_ids=np.array([151644, 872, 198, 785, 4226, 374, 17]),  # J = 7
        ...     scored=(TokenSpan(start=3, stop=5), TokenSpan(start=6, stop=7)),  # S = 3
        ... )

    Raises:
        AlignmentError: a scored token has none before it, or the spans are not within the tokens.
    """

    rollout_id: str
    """Names the rollout in error messages; it does not affect the score."""
    token_ids: IntArray
    """[J] everything that the teacher reads, its context first."""
    scored: tuple[TokenSpan, ...]
    """Which of ``token_ids`` get a score; the first span starts at 1 or later."""
    tag: str | None = None
    """Which of several teachers scores; None: there is one."""
    candidate_ids: IntArray | None = None
    """[S, K] tokens whose logprobs a `GivenCandidatesRequest` asks for, distinct within a row."""

    def __post_init__(self) -> None:
        what = f"scoring job of {self.rollout_id}"
        ids = _checked_ids(self.token_ids, 1, f"{what}: token_ids")
        _check_spans(self.scored, 1, int(ids.size), f"{what}: scored")
        if self.candidate_ids is not None:
            candidates = _checked_candidates(self.candidate_ids, self.num_scored, what)
            object.__setattr__(self, "candidate_ids", candidates)
        object.__setattr__(self, "token_ids", ids)
        object.__setattr__(self, "scored", tuple(self.scored))

    @property
    def num_scored(self) -> int:
        """S: scored tokens."""
        return sum(span.num_tokens for span in self.scored)

    @property
    def scored_indices(self) -> IntArray:
        """[S] indices into ``token_ids`` of the scored tokens, in order."""
        return np.concatenate([np.arange(span.start, span.stop) for span in self.scored])

    @property
    def context_ids(self) -> IntArray:
        """Tokens before the first scored one; requests for one prompt share them."""
        return self.token_ids[: self.scored[0].start]


@dataclass(frozen=True)
class SampledRequest:
    """Asks a teacher for the sampled token's logprob only."""


@dataclass(frozen=True)
class TopKRequest:
    """Asks a teacher for its k most likely tokens as well."""

    k: int


@dataclass(frozen=True)
class GivenCandidatesRequest:
    """Asks a teacher for the logprobs of each job's ``candidate_ids`` as well."""

    k: int
    """Candidates at every scored token."""


@dataclass(frozen=True)
class HiddenRequest:
    """Asks a teacher for its last hidden states as well; the learner rebuilds the full
    distribution from them."""


ScoreRequest: TypeAlias = SampledRequest | TopKRequest | GivenCandidatesRequest | HiddenRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherScore:
    """The teacher's log-probability of every scored token."""

    teacher_id: str
    logprobs: FloatArray
    """[S] nats, at temperature 1."""

    def __post_init__(self) -> None:
        checked = _checked_logprobs(self.logprobs, 1, f"score by {self.teacher_id}: logprobs")
        object.__setattr__(self, "logprobs", checked)


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKScore(TeacherScore):
    """A `TeacherScore` with K candidates at every scored token: the teacher's most likely tokens,
    or with `GivenCandidatesRequest` the student's."""

    candidate_ids: IntArray
    """[S, K], most likely first for the model that chose them; distinct within a row."""
    candidate_logprobs: FloatArray
    """[S, K] nats, of the full distribution: not renormalised over the K."""

    def __post_init__(self) -> None:
        TeacherScore.__post_init__(self)
        what = f"score by {self.teacher_id}"
        ids = _checked_ids(self.candidate_ids, 2, f"{what}: candidate_ids")
        logprobs = _checked_logprobs(self.candidate_logprobs, 2, f"{what}: candidate_logprobs")
        if ids.shape != logprobs.shape or len(ids) != self.logprobs.size or ids.shape[1] < 1:
            raise AlignmentError(
                f"{what}: candidate_ids {ids.shape}, candidate_logprobs {logprobs.shape}, "
                f"expected [{self.logprobs.size}, K >= 1] both"
            )
        _check_distinct(ids, what)
        object.__setattr__(self, "candidate_ids", ids)
        object.__setattr__(self, "candidate_logprobs", logprobs)


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenScore(TeacherScore):
    """A `TeacherScore` with the teacher's last hidden states.

    The learner has the teacher's output head and computes the full distribution from them in
    chunks: D numbers per token are sent instead of one per vocabulary entry.
    """

    hidden: FloatArray
    """[S, D] after the final norm: the input of the output head."""

    def __post_init__(self) -> None:
        TeacherScore.__post_init__(self)
        hidden = _frozen_array(
            self.hidden, np.float32, 2, f"score by {self.teacher_id}: hidden states"
        )
        if len(hidden) != self.logprobs.size or not np.isfinite(hidden).all():
            raise AlignmentError(
                f"score by {self.teacher_id}: hidden states {hidden.shape} for "
                f"{self.logprobs.size} tokens, expected finite [{self.logprobs.size}, D]"
            )
        object.__setattr__(self, "hidden", hidden)


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignedScore:
    """The log-probability of spans of sampled tokens under a teacher with a tokenizer of its own.

    It is no `TeacherScore`: a span's value is that of all its tokens together, and no token has one
    of its own.

    Example: the student sampled ``un | believ | able |  story``, and the teacher reads
    ``unbeliev | able |  story``.

        >>> AlignedScore(
        ...     teacher_id=teacher_id,
        ...     span_tokens=np.array([2, 1, 1]),
        ...     logprobs=np.array([-3.1, -0.2, -1.4]),
        ... )

    Raises:
        AlignmentError: there is no span, one has no token, or the values are not one a span.
    """

    teacher_id: str
    span_tokens: IntArray
    """[P] sampled tokens of each span, at least 1. The spans follow one another from the rollout's
    first sampled token on; sampled tokens after the last one have no score."""
    logprobs: FloatArray
    """[P] nats, at temperature 1: the sum over the teacher's own tokens of the span."""

    def __post_init__(self) -> None:
        what = f"score by {self.teacher_id}"
        tokens = _checked_ids(self.span_tokens, 1, f"{what}: span_tokens")
        logprobs = _checked_logprobs(self.logprobs, 1, f"{what}: logprobs of spans")
        if tokens.size == 0 or int(tokens.min()) < 1 or tokens.size != logprobs.size:
            raise AlignmentError(
                f"{what}: spans of {tokens.tolist()} tokens with {logprobs.size} logprobs, "
                "expected at least one span, each of a token or more and with one logprob"
            )
        object.__setattr__(self, "span_tokens", tokens)
        object.__setattr__(self, "logprobs", logprobs)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens in all spans."""
        return int(self.span_tokens.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreFailure:
    """A rollout that the teacher failed to score. It is dropped and counted."""

    rollout_id: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class UnalignedRollout(ScoreFailure):
    """A rollout of which nothing can be aligned with the teacher's tokens: it is not asked about.

    It is dropped and counted by itself, since no engine failed.
    """


ScoreResult: TypeAlias = TeacherScore | ScoreFailure


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRollout:
    """A rollout to train on, without a score: for objectives that compare with no teacher.

    Raises:
        DataError: the rollout is greedy, so that no loss over samples may use it.
    """

    rollout: Rollout

    def __post_init__(self) -> None:
        if self.rollout.sampling.is_greedy:
            raise DataError(
                f"rollout {self.rollout.rollout_id} was sampled at temperature 0: greedy answers "
                "are for evaluation and cannot be trained on; sample with a positive temperature"
            )

    @property
    def num_loss_tokens(self) -> int:
        """Tokens with a loss: every sampled token."""
        return self.rollout.num_loss_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRollout(TrainingRollout):
    """A rollout with its teacher's score: one value per sampled token.

    Raises:
        AlignmentError: the score has another number of tokens.
        DataError: the rollout is greedy, so that no loss over samples may use it.
    """

    score: TeacherScore

    def __post_init__(self) -> None:
        TrainingRollout.__post_init__(self)
        if self.score.logprobs.size != self.rollout.num_loss_tokens:
            raise AlignmentError(
                f"rollout {self.rollout.rollout_id}: {self.rollout.num_loss_tokens} sampled "
                f"tokens but {self.score.logprobs.size} scores from {self.score.teacher_id}. "
                "A difference of the prompt's length means that the prompt was not stripped."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignedRollout(TrainingRollout):
    """A rollout with the scores of a teacher that has a tokenizer of its own: one value per span.

    Raises:
        AlignmentError: the spans have more tokens than the student sampled.
        DataError: the rollout is greedy, so that no loss over samples may use it.
    """

    score: AlignedScore

    def __post_init__(self) -> None:
        TrainingRollout.__post_init__(self)
        if self.score.num_tokens > self.rollout.num_loss_tokens:
            raise AlignmentError(
                f"rollout {self.rollout.rollout_id}: {self.rollout.num_loss_tokens} sampled "
                f"tokens but spans of {self.score.num_tokens} from {self.score.teacher_id}"
            )

    @property
    def num_loss_tokens(self) -> int:
        """Tokens with a loss: those in spans. What could not be aligned has none."""
        return self.score.num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The rollouts of one optimizer step, with their weights and the step's denominator.

    Example: two rollouts, drawn with different probabilities, without task reward.

        >>> Batch(
        ...     scored=(one, other),  # of 5 and 40 sampled tokens
        ...     importance_weights=np.array([1.0, 0.5]),
        ...     task_advantages=np.array([0.0, 0.0]),
        ... ).denominator
        25.0

    Raises:
        AlignmentError: there is no rollout, a per-rollout array does not have one finite value per
            rollout, or an importance weight is not positive.
    """

    scored: tuple[TrainingRollout, ...]
    """With scores: all of them, or none."""
    importance_weights: FloatArray
    """[N] w_i > 0: corrects *which* rollout was drawn (prioritised replay); 1 if uniform."""
    task_advantages: FloatArray
    """[N] weighted, group-centred task reward: added to every sampled token's advantage, or with
    GRPO the advantage itself; 0 without a task reward."""

    @classmethod
    def uniform(cls, scored: Sequence[TrainingRollout]) -> "Batch":
        """Make a batch with weights 1 and without task reward."""
        return cls(
            scored=tuple(scored),
            importance_weights=np.ones(len(scored), dtype=np.float32),
            task_advantages=np.zeros(len(scored), dtype=np.float32),
        )

    def __post_init__(self) -> None:
        if not self.scored:
            raise AlignmentError("a batch needs at least one rollout")
        for name in ("importance_weights", "task_advantages"):
            array = _frozen_array(getattr(self, name), np.float32, 1, f"batch: {name}")
            if array.size != len(self.scored) or not np.isfinite(array).all():
                raise AlignmentError(
                    f"batch: {name} has {array.size} values for {len(self.scored)} rollouts, "
                    "expected one finite value each"
                )
            object.__setattr__(self, name, array)
        if float(self.importance_weights.min()) <= 0:
            raise AlignmentError("batch: importance weights must be positive")

    @property
    def num_loss_tokens(self) -> int:
        """Tokens with a loss of the whole step."""
        return sum(s.num_loss_tokens for s in self.scored)

    @property
    def denominator(self) -> float:
        """sum_i w_i n_i over the whole step, n_i the tokens of rollout i that have a loss: every
        micro-batch divides by it."""
        return float(
            sum(
                float(w) * s.num_loss_tokens
                for w, s in zip(self.importance_weights, self.scored, strict=True)
            )
        )

    def lag_steps(self, version: WeightVersion) -> int:
        """Age in optimizer steps of the student's oldest token, seen from ``version``; 0 where the
        teacher sampled all."""
        oldest = [s.rollout.oldest_version for s in self.scored]
        return max((version.step - found.step for found in oldest if found), default=0)


class Reduction(str, Enum):
    """Rule by which values of one metric combine over micro-batches or steps."""

    MEAN = "mean"
    SUM = "sum"
    MAX = "max"
    LAST = "last"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A number with the rule by which it combines with others of its key.

    A mean keeps its total and its count, so a mean over unequal parts is exact.
    """

    key: str
    """``area/name_unit``, e.g. ``loss/reverse_kl_nats``."""
    total: float
    count: float
    reduction: Reduction

    @classmethod
    def mean(cls, key: str, total: float, count: float) -> "Metric":
        return cls(key=key, total=total, count=count, reduction=Reduction.MEAN)

    @classmethod
    def sum(cls, key: str, total: float) -> "Metric":
        return cls(key=key, total=total, count=1, reduction=Reduction.SUM)

    @classmethod
    def max(cls, key: str, value: float) -> "Metric":
        return cls(key=key, total=value, count=1, reduction=Reduction.MAX)

    @classmethod
    def last(cls, key: str, value: float) -> "Metric":
        return cls(key=key, total=value, count=1, reduction=Reduction.LAST)

    @property
    def value(self) -> float:
        if self.reduction is Reduction.MEAN:
            return self.total / self.count if self.count else math.nan
        return self.total

    def combined(self, other: "Metric") -> "Metric":
        """Combine this metric with a later one of the same key."""
        if (self.key, self.reduction) != (other.key, other.reduction):
            raise ValueError(f"cannot combine {self.key} ({self.reduction}) with {other.key}")
        if self.reduction is Reduction.MAX:
            # Not max(): it drops a NaN or keeps it depending on the order.
            return Metric.max(self.key, float(np.maximum(self.total, other.total)))
        if self.reduction is Reduction.LAST:
            return other
        return Metric(
            key=self.key,
            total=self.total + other.total,
            count=self.count + other.count,
            reduction=self.reduction,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """Result of one optimizer step."""

    version: WeightVersion
    """The version *after* the step."""
    loss: float
    grad_norm: float
    num_loss_tokens: int
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """Properties that two models must share before one may score the other's tokens."""

    name: str
    tokenizer_digest: str
    vocab_size: int
    """Rows of the output head, over which the softmax runs."""
    eos_ids: frozenset[int]
    chat_template_digest: str
    context_length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCursor:
    """Position of a run after ``step`` steps. A resume needs it and the learner's state.

    It holds no random-generator states: every draw derives from (seed, purpose, step, index), so
    the position alone restores them (docs/adr/0003).
    """

    step: int
    prompts_drawn: int
    weight_version: WeightVersion
    outstanding: tuple[int, ...] = ()
    """Numbers of the rollouts of drawn prompts that are not settled (neither trained on nor
    dropped): they are sampled again after a resume. With G samples per prompt, rollout n is sample
    n % G of prompt n // G."""
