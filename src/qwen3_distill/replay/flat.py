"""Rollouts behind one another in flat tensors: what a buffer holds and what batches are laid from.

Shape letters: S rollouts, F token slots of all of them, K teacher candidates, D teacher hidden
size. A rollout's prompt and response stand in consecutive slots. Per-token values stand in the
slot of the token they describe, so those of prompt tokens mean nothing and are never read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_distill.errors import AlignmentError
from qwen3_distill.types import HiddenScore, ScoredRollout, TopKScore

Counts: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class FlatRollouts:
    """Per-token tensors on one device; where each rollout stands in them, on the host."""

    token_id_F: Tensor
    """int32."""
    behavior_logprob_F: Tensor
    """float32 nats."""
    teacher_logprob_F: Tensor
    """float32 nats."""
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
    """At least 1."""
    oldest_step_S: Counts
    """Step of the oldest weights that sampled any of the rollout's tokens."""

    @property
    def num_rollouts(self) -> int:
        return len(self.starts_S)

    @cached_property
    def tokens_S(self) -> Counts:
        """Prompt and response tokens of each rollout."""
        return self.prompt_tokens_S + self.response_tokens_S

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The per-token tensors that are there, by name."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                yield entry.name, value

    def dense(self) -> "FlatRollouts":
        """The same rollouts in their order, without anything between them."""
        starts_S = np.cumsum(self.tokens_S) - self.tokens_S
        if np.array_equal(starts_S, self.starts_S) and len(self.token_id_F) == self.tokens_S.sum():
            return self
        slots = torch.from_numpy(spans(self.starts_S, self.tokens_S)).to(self.token_id_F.device)
        copied: dict[str, Any] = {
            name: values.index_select(0, slots) for name, values in self.tensors()
        }
        return replace(self, starts_S=starts_S, **copied)


def spans(starts_S: Counts, lengths_S: Counts) -> Counts:
    """``[start, start + length)`` of every entry, one after another."""
    before_S = np.cumsum(lengths_S) - lengths_S
    return np.repeat(starts_S - before_S, lengths_S) + np.arange(lengths_S.sum())


def flatten(scored: Sequence[ScoredRollout]) -> FlatRollouts:
    """Records to flat tensors on the host, nothing between them.

    Raises:
        AlignmentError: the rollouts mix kinds of teacher score, or numbers of candidates.
    """
    rollouts = [entry.rollout for entry in scored]
    prompt_S = _counts(rollout.prompt.token_ids.size for rollout in rollouts)
    response_S = _counts(rollout.num_tokens for rollout in rollouts)
    ends_S = np.cumsum(prompt_S + response_S)
    response_F = spans(ends_S - response_S, response_S)

    def placed(values: list[NDArray[Any]], dtype: type[np.generic]) -> Tensor:
        joined = np.concatenate(values)
        slots = np.zeros((ends_S[-1], *joined.shape[1:]), dtype=dtype)
        slots[response_F] = joined
        return torch.from_numpy(slots)

    ids = [part for r in rollouts for part in (r.prompt.token_ids, r.response_ids)]
    return FlatRollouts(
        token_id_F=torch.from_numpy(np.concatenate(ids).astype(np.int32, copy=False)),
        behavior_logprob_F=placed([r.behavior_logprobs for r in rollouts], np.float32),
        **{name: placed(values, dtype) for name, (values, dtype) in _score_values(scored).items()},
        starts_S=ends_S - prompt_S - response_S,
        prompt_tokens_S=prompt_S,
        response_tokens_S=response_S,
        oldest_step_S=_counts(rollout.oldest_version.step for rollout in rollouts),
    )


def _score_values(
    scored: Sequence[ScoredRollout],
) -> dict[str, tuple[list[NDArray[Any]], type[np.generic]]]:
    """Every rollout's arrays of each field that its kind of score fills."""
    scores = [entry.score for entry in scored]
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


def _counts(values: Iterator[int]) -> Counts:
    return np.fromiter(values, dtype=np.int64)
