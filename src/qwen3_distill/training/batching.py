"""Lays records out as tensors: the one place that shifts, pads and packs.

A sequence's position t holds input token t; its target is token t + 1. The response's first target
therefore stands at the prompt's last position. A sequence's input is its prompt and its whole
response; its loss tokens are the sampled ones. Sequences are padded on the right, a row each, or
concatenated ("packed") in one row. Values of a loss token are held per loss token, so padding and
tokens that were not sampled never meet a logprob.

Shape letters: B rows of a micro-batch, T positions of a row, N loss tokens of the micro-batch in
the order of its rollouts, K teacher candidates, D teacher hidden size, S rollouts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen3_distill.modeling.host_to_device import to_device
from qwen3_distill.replay.flat import Counts, FlatRollouts, flatten, spans
from qwen3_distill.types import Batch
from qwen3_distill.utils.batches import padded_batches


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass."""

    rollouts: tuple[int, ...]
    """Indices of its rollouts in the step, in order."""
    input_BT: Tensor
    """int64 token ids; 0 at padding."""
    position_BT: Tensor
    """int64: starts at 0 with every sequence; 0 at padding."""
    sequence_tokens: tuple[int, ...]
    """Input tokens of each sequence, in order."""
    loss_tokens: tuple[int, ...]
    """Loss tokens of each sequence, in order; they sum to N."""
    loss_index_N: Tensor
    """int64: where in the flattened [B, T] each loss token is predicted."""
    target_N: Tensor
    """int64 token ids."""
    by_teacher: tuple[bool, ...]
    """Whether a teacher sampled each sequence, in order; else the student did."""
    is_scored: bool
    """Whether a teacher scored the rollouts."""
    behavior_logprob_N: Tensor
    """float32 nats, under the student that sampled; NaN where a teacher did."""
    teacher_logprob_N: Tensor
    """float32 nats; NaN if `is_scored` is False."""
    importance_weight_N: Tensor
    """float32: w_i of the token's rollout."""
    task_advantage_N: Tensor
    """float32, added to the token's advantage."""

    def to(self, device: torch.device) -> "MicroBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: to_device(value, device) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        return type(self)(**moved)

    def at_loss_tokens(self, values_BTD: Tensor) -> Tensor:
        """[N, D]: the rows that predict the targets."""
        return values_BTD.flatten(0, 1).index_select(0, self.loss_index_N)


@dataclass(frozen=True, kw_only=True)
class TopKMicroBatch(MicroBatch):
    """A micro-batch with the teacher's candidates."""

    candidate_id_NK: Tensor
    """int64."""
    candidate_logprob_NK: Tensor
    """float32 nats, of the full distribution."""


@dataclass(frozen=True, kw_only=True)
class HiddenMicroBatch(MicroBatch):
    """A micro-batch with the teacher's last hidden states."""

    teacher_hidden_ND: Tensor
    """float32."""


def micro_batches(batch: Batch, max_tokens: int, *, packed: bool = False) -> Iterator[MicroBatch]:
    """Split a batch by the size of its layout. The split changes memory and speed only.

    Args:
        max_tokens: B x T of a micro-batch; a longer sequence gets one of its own.
        packed: concatenate sequences in one row, instead of a padded row each.

    Raises:
        AlignmentError: the batch mixes kinds of teacher score.
    """
    tokens = [s.rollout.prompt.token_ids.size + s.rollout.num_tokens for s in batch.scored]
    for group in _groups(tokens, max_tokens, packed=packed):
        yield collate(batch, group, packed=packed)


def flat_micro_batches(
    flat: FlatRollouts,
    weights_S: Tensor,
    max_tokens: int,
    *,
    rows: Sequence[int] | None = None,
    packed: bool = False,
) -> Iterator[MicroBatch]:
    """Split flat rollouts as `micro_batches` does, on their device.

    Args:
        weights_S: importance weight of each rollout, on that device.
        rows: the rollouts to take; None: all.
    """
    no_reward_S = torch.zeros_like(weights_S)
    taken = np.arange(flat.num_rollouts) if rows is None else np.asarray(rows, dtype=np.int64)
    for places in _groups(flat.tokens_S[taken].tolist(), max_tokens, packed=packed):
        group = taken[places].tolist()
        yield _lay_out(flat, group, group, weights_S, no_reward_S, packed=packed)


def collate(batch: Batch, indices: Sequence[int], *, packed: bool = False) -> MicroBatch:
    """Lay the batch's rollouts ``indices`` out as one micro-batch."""
    flat = flatten([batch.scored[index] for index in indices])
    weights_S, rewards_S = (
        torch.from_numpy(values[np.asarray(indices)])
        for values in (batch.importance_weights, batch.task_advantages)
    )
    rows = range(len(indices))
    return _lay_out(flat, rows, indices, weights_S, rewards_S, packed=packed)


def _groups(tokens: Sequence[int], max_tokens: int, *, packed: bool) -> list[list[int]]:
    lengths = [count - 1 for count in tokens]  # the last token is a target only
    return _packed_rows(lengths, max_tokens) if packed else padded_batches(lengths, max_tokens)


def _lay_out(
    flat: FlatRollouts,
    rows: Sequence[int],
    rollouts: Sequence[int],
    weights_S: Tensor,
    rewards_S: Tensor,
    *,
    packed: bool,
) -> MicroBatch:
    """Lay the rollouts ``rows`` of ``flat`` out as one micro-batch: shift, then pad or pack.

    Args:
        rollouts: their indices in the step.
        weights_S: importance weight of every rollout in ``flat``.
        rewards_S: task advantage of every rollout in ``flat``.
    """
    chosen = np.asarray(rows)
    device = flat.token_id_F.device
    prompt_S, response_S = flat.prompt_tokens_S[chosen], flat.response_tokens_S[chosen]
    starts_S, inputs_S = flat.starts_S[chosen], prompt_S + response_S - 1
    shape, places_S = _places(inputs_S, packed=packed)
    slot_N = spans(starts_S + prompt_S, response_S)
    index_N = spans(places_S + prompt_S - 1, response_S)
    if flat.is_unsampled_F is not None:
        is_sampled = ~flat.is_unsampled_F[slot_N]
        slot_N, index_N = slot_N[is_sampled], index_N[is_sampled]
    loss_S = flat.loss_tokens_S[chosen]
    no_teacher_S = np.zeros(len(chosen), dtype=np.bool_)
    by_teacher_S = no_teacher_S if flat.by_teacher_S is None else flat.by_teacher_S[chosen]

    def moved(values: Counts) -> Tensor:
        return to_device(torch.from_numpy(values), device)

    input_place = moved(spans(places_S, inputs_S))

    def padded(values: Tensor) -> Tensor:
        empty = torch.zeros(shape[0] * shape[1], dtype=torch.int64, device=device)
        return empty.index_copy_(0, input_place, values.long()).view(shape)

    target_N, row_N = moved(slot_N), moved(np.repeat(chosen, loss_S))
    common: dict[str, Any] = {
        "rollouts": tuple(rollouts),
        "input_BT": padded(flat.token_id_F.index_select(0, moved(spans(starts_S, inputs_S)))),
        "position_BT": padded(moved(spans(np.zeros_like(inputs_S), inputs_S))),
        "sequence_tokens": tuple(inputs_S.tolist()),
        "loss_tokens": tuple(loss_S.tolist()),
        "loss_index_N": moved(index_N),
        "by_teacher": tuple(by_teacher_S.tolist()),
        "is_scored": flat.is_scored,
        "target_N": flat.token_id_F.index_select(0, target_N).long(),
        "behavior_logprob_N": flat.behavior_logprob_F.index_select(0, target_N),
        "teacher_logprob_N": flat.teacher_logprob_F.index_select(0, target_N),
        "importance_weight_N": weights_S[row_N],
        "task_advantage_N": rewards_S[row_N],
    }
    return _of_score_kind(flat, target_N, common)


def _of_score_kind(flat: FlatRollouts, target_N: Tensor, common: dict[str, Any]) -> MicroBatch:
    """Build the micro-batch class that holds all of the teacher's values in ``flat``."""
    if flat.candidate_id_FK is not None and flat.candidate_logprob_FK is not None:
        return TopKMicroBatch(
            **common,
            candidate_id_NK=flat.candidate_id_FK.index_select(0, target_N).long(),
            candidate_logprob_NK=flat.candidate_logprob_FK.index_select(0, target_N),
        )
    if flat.teacher_hidden_FD is not None:
        return HiddenMicroBatch(
            **common, teacher_hidden_ND=flat.teacher_hidden_FD.index_select(0, target_N)
        )
    return MicroBatch(**common)


def _places(inputs_S: Counts, *, packed: bool) -> tuple[tuple[int, int], Counts]:
    """(B, T), and where each sequence begins in the flattened [B, T]."""
    if packed:
        return (1, int(inputs_S.sum())), np.cumsum(inputs_S) - inputs_S
    width = int(inputs_S.max())
    return (len(inputs_S), width), width * np.arange(len(inputs_S))


def _packed_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices so that lengths sum to at most ``max_tokens``; longest first, first fit.

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
