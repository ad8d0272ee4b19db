"""From records to tensors: the one place that shifts and lays out.

Shape letters: B rows of a micro-batch, T positions of a row, N loss tokens of the micro-batch in
the order of its rollouts, K teacher candidates, D teacher hidden size.

A sequence's position t holds input token t; its target is token t + 1. The response's first target
therefore stands at the prompt's last position. Sequences are padded on the right, a row each, or
packed behind one another in one row. What belongs to a loss token is held per loss token, so
padding never meets a logprob.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_distill.errors import AlignmentError
from qwen3_distill.types import Batch, HiddenScore, Rollout, TeacherScore, TopKScore
from qwen3_distill.utils.packing import pack_by_tokens


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass."""

    input_BT: Tensor
    """int64 token ids; 0 where nothing stands."""
    position_BT: Tensor
    """int64: starts at 0 with every sequence; 0 where nothing stands."""
    sequence_tokens: tuple[int, ...]
    """Input tokens of each sequence, in order."""
    loss_tokens: tuple[int, ...]
    """Loss tokens of each sequence, in order; they sum to N."""
    loss_index_N: Tensor
    """int64: where the loss tokens stand in the flattened [B, T]."""
    target_N: Tensor
    """int64 token ids."""
    behavior_logprob_N: Tensor
    """float32 nats."""
    teacher_logprob_N: Tensor
    """float32 nats."""
    importance_weight_N: Tensor
    """float32: w_i of the token's rollout."""
    task_advantage_N: Tensor
    """float32, added to the token's advantage."""

    def to(self, device: torch.device) -> "MicroBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        return type(self)(**moved)

    def at_loss_tokens(self, values_BTD: Tensor) -> Tensor:
        """[N, D]: the rows that the targets are predicted from."""
        return values_BTD.flatten(0, 1).index_select(0, self.loss_index_N)


@dataclass(frozen=True, kw_only=True)
class TopKMicroBatch(MicroBatch):
    """With the teacher's candidates."""

    candidate_id_NK: Tensor
    """int64."""
    candidate_logprob_NK: Tensor
    """float32 nats, of the full distribution."""


@dataclass(frozen=True, kw_only=True)
class HiddenMicroBatch(MicroBatch):
    """With the teacher's last hidden states."""

    teacher_hidden_ND: Tensor
    """float32."""


def micro_batches(batch: Batch, max_tokens: int, *, packed: bool = False) -> Iterator[MicroBatch]:
    """Split a batch by the size of its layout. How it is split changes memory and speed only.

    Args:
        max_tokens: B x T of a micro-batch; a longer sequence gets one of its own.
        packed: sequences behind one another in one row, instead of a padded row each.

    Raises:
        AlignmentError: the batch mixes kinds of teacher score.
    """
    lengths = [_input_tokens(scored.rollout) for scored in batch.scored]
    groups = _fill(lengths, max_tokens) if packed else pack_by_tokens(lengths, max_tokens)
    for group in groups:
        yield collate(batch, group, packed=packed)


def collate(batch: Batch, indices: Sequence[int], *, packed: bool = False) -> MicroBatch:
    """Lay the batch's rollouts ``indices`` out as one micro-batch."""
    chosen = [batch.scored[index] for index in indices]
    rollouts = [scored.rollout for scored in chosen]
    scores = [scored.score for scored in chosen]
    kinds = {type(score) for score in scores}
    if len(kinds) != 1:
        names = sorted(kind.__name__ for kind in kinds)
        raise AlignmentError(f"one batch holds scores of several kinds: {', '.join(names)}")
    layout = _Layout.of(rollouts, packed=packed)
    counts = [rollout.num_tokens for rollout in rollouts]
    index = np.asarray(indices)
    common: dict[str, Any] = {
        "input_BT": layout.filled([_ids(rollout)[:-1] for rollout in rollouts]),
        "position_BT": layout.filled([np.arange(length) for length in layout.lengths]),
        "sequence_tokens": layout.lengths,
        "loss_tokens": tuple(counts),
        "loss_index_N": layout.loss_index(rollouts),
        "target_N": _joined([r.response_ids for r in rollouts], np.int64),
        "behavior_logprob_N": _joined([r.behavior_logprobs for r in rollouts], np.float32),
        "teacher_logprob_N": _joined([score.logprobs for score in scores], np.float32),
        "importance_weight_N": torch.from_numpy(np.repeat(batch.importance_weights[index], counts)),
        "task_advantage_N": torch.from_numpy(np.repeat(batch.task_advantages[index], counts)),
    }
    return _with_teacher_detail(scores, common)


def _with_teacher_detail(scores: Sequence[TeacherScore], common: dict[str, Any]) -> MicroBatch:
    if all(isinstance(score, TopKScore) for score in scores):
        top_k = [score for score in scores if isinstance(score, TopKScore)]
        return TopKMicroBatch(
            **common,
            candidate_id_NK=_joined([s.candidate_ids for s in top_k], np.int64),
            candidate_logprob_NK=_joined([s.candidate_logprobs for s in top_k], np.float32),
        )
    if all(isinstance(score, HiddenScore) for score in scores):
        hidden = [score for score in scores if isinstance(score, HiddenScore)]
        return HiddenMicroBatch(
            **common,
            teacher_hidden_ND=_joined([s.hidden for s in hidden], np.float32),
        )
    return MicroBatch(**common)


@dataclass(frozen=True)
class _Layout:
    """Where each sequence starts in the flattened [B, T]."""

    shape: tuple[int, int]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], *, packed: bool) -> "_Layout":
        lengths = tuple(_input_tokens(rollout) for rollout in rollouts)
        if packed:
            starts = tuple(sum(lengths[:row]) for row in range(len(lengths)))
            return cls((1, sum(lengths)), starts, lengths)
        width = max(lengths)
        return cls((len(lengths), width), tuple(width * r for r in range(len(lengths))), lengths)

    def filled(self, per_sequence: Sequence[NDArray[np.integer]]) -> Tensor:
        """[B, T] int64 with each sequence's values in its place."""
        flat = np.zeros(self.shape[0] * self.shape[1], dtype=np.int64)
        for start, values in zip(self.starts, per_sequence, strict=True):
            flat[start : start + len(values)] = values
        return torch.from_numpy(flat.reshape(self.shape))

    def loss_index(self, rollouts: Sequence[Rollout]) -> Tensor:
        """[N]: the positions that response tokens are predicted from."""
        firsts = [
            start + rollout.prompt.token_ids.size - 1
            for start, rollout in zip(self.starts, rollouts, strict=True)
        ]
        spans = [
            np.arange(first, first + rollout.num_tokens)
            for first, rollout in zip(firsts, rollouts, strict=True)
        ]
        return torch.from_numpy(np.concatenate(spans))


def _ids(rollout: Rollout) -> NDArray[np.integer]:
    return np.concatenate([rollout.prompt.token_ids, rollout.response_ids])


def _input_tokens(rollout: Rollout) -> int:
    """The last token is a target only."""
    return rollout.prompt.token_ids.size + rollout.num_tokens - 1


def _joined(per_rollout: Sequence[NDArray[np.generic]], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate(per_rollout).astype(dtype))


def _fill(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups of indices whose lengths sum to at most ``max_tokens``; longest first, first fit.

    A longer sequence gets a group of its own. Deterministic; every index occurs exactly once.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fits = (group for group, free in enumerate(room) if free >= lengths[index])
        group = next(fits, None)
        if group is None:
            groups.append([index])
            room.append(max_tokens - lengths[index])
        else:
            groups[group].append(index)
            room[group] -= lengths[index]
    return groups
