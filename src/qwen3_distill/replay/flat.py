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
from qwen3_distill.types import HiddenScore, Rollout, ScoredRollout, TopKScore, TrainingRollout

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
    """Whether a teacher scored the rollouts."""
    is_unsampled_F: Flags | None = None
    """True in the slots of response tokens that the student did not sample, on the host. None:
    there is no such token, and nothing needs to be looked up."""

    @property
    def num_rollouts(self) -> int:
        return len(self.starts_S)

    @cached_property
    def tokens_S(self) -> Counts:
        """Prompt and response tokens of each rollout."""
        return self.prompt_tokens_S + self.response_tokens_S

    @cached_property
    def loss_tokens_S(self) -> Counts:
        """Sampled tokens of each rollout, at least 1: its share of the loss's denominator."""
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

    def placed(values: list[NDArray[Any]], dtype: type[np.generic]) -> Tensor:
        joined = np.concatenate(values)
        slots = np.zeros((ends_S[-1], *joined.shape[1:]), dtype=dtype)
        slots[sampled_N] = joined
        return torch.from_numpy(slots)

    is_unsampled_F = None
    if len(sampled_N) < response_S.sum():
        is_unsampled_F = np.zeros(ends_S[-1], dtype=np.bool_)
        is_unsampled_F[spans(response_starts_S, response_S)] = True
        is_unsampled_F[sampled_N] = False
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
        return {"teacher_logprob_F": (unknown, np.float32)}
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
