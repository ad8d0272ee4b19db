"""Rollouts as flat tensors: the form that the replay buffer keeps, and batches start from.

A rollout's prompt and response stand in consecutive token slots. A per-token value stands in the
slot of the sampled token that it describes. In the slots of all other tokens (of the prompt, and
of the response where the student did not sample them) it means nothing, and no batch reads it.

Shape letters: S rollouts, F token slots of all of them, X spans of sampled tokens of all of them,
K teacher candidates, D teacher hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_distill.errors import AlignmentError
from qwen3_distill.types import (
    AlignedRollout,
    HiddenScore,
    Rollout,
    ScoredRollout,
    TopKScore,
    TrainingRollout,
)

Counts: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class FlatRollouts:
    """Per-token tensors on one device; where each rollout stands in them, on the host."""

    token_id_F: Tensor
    """int32."""
    behavior_logprob_F: Tensor
    """float32 nats, under the student that sampled; NaN for the tokens of a teacher's answer, so
    that a ratio with them cannot pass for a number."""
    teacher_logprob_F: Tensor
    """float32 nats; NaN everywhere if `is_scored` is False."""
    candidate_id_FK: Tensor | None = None
    """int32."""
    candidate_logprob_FK: Tensor | None = None
    """float32 nats, of the full distribution."""
    teacher_hidden_FD: Tensor | None = None
    """float32."""
    span_logprob_F: Tensor | None = None
    """float32 nats, of the span that begins at this token; NaN in all other slots. Filled by a
    teacher with a tokenizer of its own, and `teacher_logprob_F` is then NaN everywhere."""
    starts_S: Counts
    """Slot of each rollout's first prompt token."""
    prompt_tokens_S: Counts
    """At least 1."""
    response_tokens_S: Counts
    """At least 1; sampled or not."""
    oldest_step_S: Counts
    """Step of the student's oldest weights that sampled any of the rollout's tokens. It means
    nothing for a teacher's answer."""
    by_teacher_S: Flags | None = None
    """Which rollouts a teacher sampled; None: the student sampled all."""
    is_scored: bool = True
    """Whether a teacher scored the rollouts token by token."""
    is_unsampled_F: Flags | None = None
    """True in the slots of response tokens without a loss, on the host: those that the student did
    not sample, or that no span holds. None: there is no such token, and nothing needs to be looked
    up."""
    is_span_start_F: Flags | None = None
    """True in the slots where a span begins, on the host; None: there are no spans."""

    @property
    def num_rollouts(self) -> int:
        return len(self.starts_S)

    @cached_property
    def tokens_S(self) -> Counts:
        """Prompt and response tokens of each rollout."""
        return self.prompt_tokens_S + self.response_tokens_S

    @cached_property
    def loss_tokens_S(self) -> Counts:
        """Tokens with a loss of each rollout, at least 1: its share of the denominator."""
        if self.is_unsampled_F is None:
            return self.response_tokens_S
        response = spans(self.starts_S + self.prompt_tokens_S, self.response_tokens_S)
        first_S = np.cumsum(self.response_tokens_S) - self.response_tokens_S
        return np.add.reduceat(~self.is_unsampled_F[response], first_S, dtype=np.int64)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The per-token tensors that are filled, by name."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                yield entry.name, value

    def dense(self) -> "FlatRollouts":
        """The same rollouts in the same order, without gaps between them."""
        starts_S = np.cumsum(self.tokens_S) - self.tokens_S
        if np.array_equal(starts_S, self.starts_S) and len(self.token_id_F) == self.tokens_S.sum():
            return self
        slots = spans(self.starts_S, self.tokens_S)
        on_device = torch.from_numpy(slots).to(self.token_id_F.device)
        copied: dict[str, Any] = {
            name: values.index_select(0, on_device) for name, values in self.tensors()
        }
        if self.is_unsampled_F is not None:
            copied["is_unsampled_F"] = self.is_unsampled_F[slots]
        if self.is_span_start_F is not None:
            copied["is_span_start_F"] = self.is_span_start_F[slots]
        return replace(self, starts_S=starts_S, **copied)


def spans(starts_S: Counts, lengths_S: Counts) -> Counts:
    """``[start, start + length)`` of every entry, concatenated."""
    before_S = np.cumsum(lengths_S) - lengths_S
    return np.repeat(starts_S - before_S, lengths_S) + np.arange(lengths_S.sum())


def flatten(scored: Sequence[TrainingRollout]) -> FlatRollouts:
    """Lay records out as flat tensors on the host, without gaps.

    Raises:
        AlignmentError: the rollouts mix kinds of teacher score, numbers of candidates, or rollouts
            with and without a score.
    """
    rollouts = [entry.rollout for entry in scored]
    prompt_S = _counts(rollout.prompt.token_ids.size for rollout in rollouts)
    response_S = _counts(rollout.num_tokens for rollout in rollouts)
    ends_S = np.cumsum(prompt_S + response_S)
    response_starts_S = ends_S - response_S
    sampled_N = _sampled_slots(scored, response_starts_S)
    aligned = [entry for entry in scored if isinstance(entry, AlignedRollout)]
    loss_N = sampled_N if not aligned else sampled_N[_in_spans(scored)]

    def placed(values: list[NDArray[Any]], dtype: type[np.generic]) -> Tensor:
        joined = np.concatenate(values)
        slots = np.zeros((ends_S[-1], *joined.shape[1:]), dtype=dtype)
        slots[sampled_N] = joined
        return torch.from_numpy(slots)

    is_unsampled_F = None
    if len(loss_N) < response_S.sum():
        is_unsampled_F = np.zeros(ends_S[-1], dtype=np.bool_)
        is_unsampled_F[spans(response_starts_S, response_S)] = True
        is_unsampled_F[loss_N] = False
    is_span_start_F = None
    if aligned:
        is_span_start_F = np.zeros(ends_S[-1], dtype=np.bool_)
        is_span_start_F[loss_N] = np.concatenate([_span_starts(entry) for entry in aligned])
    ids = [part for r in rollouts for part in (r.prompt.token_ids, r.response_ids)]
    return FlatRollouts(
        token_id_F=torch.from_numpy(np.concatenate(ids).astype(np.int32, copy=False)),
        behavior_logprob_F=placed([_students_logprobs(r) for r in rollouts], np.float32),
        **{name: placed(values, dtype) for name, (values, dtype) in _score_values(scored).items()},
        starts_S=response_starts_S - prompt_S,
        prompt_tokens_S=prompt_S,
        response_tokens_S=response_S,
        oldest_step_S=_counts(
            0 if rollout.oldest_version is None else rollout.oldest_version.step
            for rollout in rollouts
        ),
        by_teacher_S=_by_teacher(rollouts),
        is_scored=isinstance(scored[0], ScoredRollout),
        is_unsampled_F=is_unsampled_F,
        is_span_start_F=is_span_start_F,
    )


def _students_logprobs(rollout: Rollout) -> NDArray[Any]:
    if rollout.sampled_by == "student":
        return rollout.behavior_logprobs
    return np.full(rollout.num_loss_tokens, np.nan, dtype=np.float32)


def _by_teacher(rollouts: Sequence[Rollout]) -> Flags | None:
    by_teacher_S = np.array([rollout.sampled_by == "teacher" for rollout in rollouts])
    return by_teacher_S if by_teacher_S.any() else None


def _sampled_slots(scored: Sequence[TrainingRollout], response_starts_S: Counts) -> Counts:
    """Slots of all sampled tokens, in order."""
    sampled = [entry.rollout.sampled for entry in scored]
    num_spans_S = _counts(len(of_rollout) for of_rollout in sampled)
    starts_X = _counts(span.start for of_rollout in sampled for span in of_rollout)
    lengths_X = _counts(span.num_tokens for of_rollout in sampled for span in of_rollout)
    return spans(np.repeat(response_starts_S, num_spans_S) + starts_X, lengths_X)


def _in_spans(scored: Sequence[TrainingRollout]) -> Flags:
    """Whether each sampled token, in order, has a loss: it is in a span.

    Raises:
        AlignmentError: rollouts with spans and others are mixed.
    """
    if any(not isinstance(entry, AlignedRollout) for entry in scored):
        raise AlignmentError("one batch holds rollouts scored by spans and others")
    sizes = [(entry.num_loss_tokens, entry.rollout.num_loss_tokens) for entry in scored]
    return np.concatenate([np.arange(sampled) < in_spans for in_spans, sampled in sizes])


def _span_starts(entry: AlignedRollout) -> Flags:
    """Whether each token in spans, in order, is the first of one."""
    is_start = np.zeros(entry.num_loss_tokens, dtype=np.bool_)
    tokens = entry.score.span_tokens
    is_start[np.cumsum(tokens) - tokens] = True
    return is_start


def _span_values(entry: AlignedRollout) -> NDArray[Any]:
    """One value per sampled token: the span's where it begins, NaN elsewhere."""
    values = np.full(entry.rollout.num_loss_tokens, np.nan, dtype=np.float32)
    values[: entry.num_loss_tokens][_span_starts(entry)] = entry.score.logprobs
    return values


def _score_values(
    scored: Sequence[TrainingRollout],
) -> dict[str, tuple[list[NDArray[Any]], type[np.generic]]]:
    """Every rollout's arrays, for each field that its kind of score fills."""
    scores = [entry.score for entry in scored if isinstance(entry, ScoredRollout)]
    if len(scores) < len(scored):
        if scores:
            raise AlignmentError(
                f"one batch holds {len(scores)} rollouts with a teacher's score and "
                f"{len(scored) - len(scores)} without"
            )
        unknown = [np.full(s.rollout.num_loss_tokens, np.nan, dtype=np.float32) for s in scored]
        by_span = [_span_values(entry) for entry in scored if isinstance(entry, AlignedRollout)]
        of_spans = {"span_logprob_F": (by_span, np.float32)} if by_span else {}
        return {"teacher_logprob_F": (unknown, np.float32), **of_spans}
    kinds = {type(score) for score in scores}
    if len(kinds) != 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise AlignmentError(f"one batch holds scores of several kinds: {names}")
    values: dict[str, tuple[list[NDArray[Any]], type[np.generic]]] = {
        "teacher_logprob_F": ([score.logprobs for score in scores], np.float32)
    }
    top_k = [score for score in scores if isinstance(score, TopKScore)]
    if top_k:
        sizes = {score.candidate_ids.shape[1] for score in top_k}
        if len(sizes) != 1:
            raise AlignmentError(f"one batch holds scores with {sorted(sizes)} candidates a token")
        values["candidate_id_FK"] = ([s.candidate_ids for s in top_k], np.int32)
        values["candidate_logprob_FK"] = ([s.candidate_logprobs for s in top_k], np.float32)
    hidden = [score.hidden for score in scores if isinstance(score, HiddenScore)]
    if hidden:
        values["teacher_hidden_FD"] = (hidden, np.float32)
    return values


def _counts(values: Iterable[int]) -> Counts:
    return np.fromiter(values, dtype=np.int64)
