"""Lays records out as tensors: the one place that shifts, pads and packs.

A sequence's position t holds input token t; its target is token t + 1. The response's first target
therefore stands at the prompt's last position. A sequence's input is its prompt and its whole
response; its loss tokens are the sampled ones. Sequences are padded on the right, a row each, or
concatenated ("packed") in one row, or packed with a prompt standing once before all of its answers
("shared prompts"). Values of a loss token are held per loss token, so padding and tokens that were
not sampled never meet a logprob.

Shape letters: B rows of a micro-batch, T positions of a row, N loss tokens of the micro-batch in
the order of its rollouts, K teacher candidates, D teacher hidden size, S rollouts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen3_distill.modeling.host_to_device import to_device
from qwen3_distill.replay.flat import Counts, Flags, FlatRollouts, flatten, spans
from qwen3_distill.types import Batch
from qwen3_distill.utils.batches import packed_rows, padded_batches


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPrompt:
    """A prompt that stands once in a packed row, with its answers behind it.

    Every answer continues the prompt: its tokens attend to the prompt and to their own answer, and
    their positions follow the prompt's.
    """

    start: int
    """Place of its first token in the row."""
    prompt_tokens: int
    answer_tokens: tuple[int, ...]
    """Input tokens of each answer, in order: its last token is a target only."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass."""

    rollouts: tuple[int, ...]
    """Indices of its rollouts in the step, in order."""
    input_BT: Tensor
    """int64 token ids; 0 at padding."""
    position_BT: Tensor
    """int64: starts at 0 with every sequence; 0 at padding. An answer behind a shared prompt
    continues the prompt's."""
    sequence_tokens: tuple[int, ...]
    """Input tokens of each sequence, in order; a shared prompt counts with its first answer."""
    shared: tuple[SharedPrompt, ...] | None = None
    """Where prompts and answers stand, if prompts are shared; None: each sequence has its own."""
    loss_tokens: tuple[int, ...]
    """Loss tokens of each sequence, in order; they sum to N."""
    loss_index_N: Tensor
    """int64: where in the flattened [B, T] each loss token is predicted."""
    target_N: Tensor
    """int64 token ids."""
    by_teacher: tuple[bool, ...]
    """Whether a teacher sampled each sequence, in order; else the student did."""
    is_scored: bool
    """Whether a teacher scored the rollouts token by token."""
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

    @property
    def attention_pairs(self) -> int:
        """Pairs of an input token and one that it attends to, padding apart."""
        if self.shared is None:
            return sum(map(triangle, self.sequence_tokens))
        return sum(
            triangle(group.prompt_tokens)
            + sum(
                triangle(group.prompt_tokens + tokens) - triangle(group.prompt_tokens)
                for tokens in group.answer_tokens
            )
            for group in self.shared
        )

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


@dataclass(frozen=True, kw_only=True)
class AlignedMicroBatch(MicroBatch):
    """A micro-batch scored by spans: its `teacher_logprob_N` is NaN, since no token has its own.

    Shape letter: P spans, in the order of their tokens. They tile the loss tokens.
    """

    span_tokens_P: Tensor
    """int64: loss tokens of each span, at least 1."""
    span_logprob_P: Tensor
    """float32 nats, under the teacher."""
    spans_per_sequence: tuple[int, ...]
    """Spans of each sequence, in order; they sum to P."""

    def per_span(self, values_N: Tensor) -> Tensor:
        """[P]: the sum over each span's tokens; with a gradient if ``values_N`` has one."""
        return torch.segment_reduce(values_N, "sum", lengths=self.span_tokens_P)

    def of_first_token(self, values_N: Tensor) -> Tensor:
        """[P]: the value of each span's first token."""
        return values_N[self.span_tokens_P.cumsum(0) - self.span_tokens_P]

    def per_token(self, values_P: Tensor) -> Tensor:
        """[N]: the value of each token's span."""
        size = self.target_N.numel()
        return values_P.repeat_interleave(self.span_tokens_P, output_size=size)


def triangle(length: int) -> int:
    """Return the pairs of a token and one that it attends to in a sequence of ``length``."""
    return length * (length + 1) // 2


def micro_batches(
    batch: Batch, max_tokens: int, *, packed: bool = False, shared_prompts: bool = False
) -> Iterator[MicroBatch]:
    """Split a batch by the size of its layout. The split changes memory and speed only.

    Args:
        max_tokens: B x T of a micro-batch; a longer sequence gets one of its own.
        packed: concatenate sequences in one row, instead of a padded row each.
        shared_prompts: concatenate, with a prompt once before its answers.

    Raises:
        AlignmentError: the batch mixes kinds of teacher score.
    """
    if shared_prompts:
        for groups in _shared_rows(batch, max_tokens):
            yield collate_shared(batch, groups)
        return
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
        group = taken[places]
        where = _places(flat, group, packed=packed)
        yield _lay_out(flat, group.tolist(), group.tolist(), weights_S, no_reward_S, where)


def collate(batch: Batch, indices: Sequence[int], *, packed: bool = False) -> MicroBatch:
    """Lay the batch's rollouts ``indices`` out as one micro-batch."""
    rows = np.arange(len(indices))
    return _collate(batch, indices, lambda flat: _places(flat, rows, packed=packed))


def collate_shared(batch: Batch, groups: Sequence[Sequence[int]]) -> MicroBatch:
    """Lay rollouts out in one row, each group behind the one prompt that it has in common."""
    indices = [index for group in groups for index in group]
    return _collate(batch, indices, lambda flat: _shared_places(flat, [len(g) for g in groups]))


def _collate(
    batch: Batch, indices: Sequence[int], places: Callable[[FlatRollouts], "_Places"]
) -> MicroBatch:
    flat = flatten([batch.scored[index] for index in indices])
    weights_S, rewards_S = (
        torch.from_numpy(values[np.asarray(indices)])
        for values in (batch.importance_weights, batch.task_advantages)
    )
    rows = range(len(indices))
    return _lay_out(flat, rows, indices, weights_S, rewards_S, places(flat))


def _shared_rows(batch: Batch, max_tokens: int) -> list[list[list[int]]]:
    """Group rollouts by prompt, in micro-batches of at most ``max_tokens``.

    A group that is longer is cut, and each part has the prompt. Deterministic; every rollout occurs
    exactly once.
    """
    of_prompt: dict[bytes, list[int]] = {}
    for index, scored in enumerate(batch.scored):
        of_prompt.setdefault(scored.rollout.prompt.token_ids.tobytes(), []).append(index)
    groups, lengths = list[list[int]](), list[int]()
    for indices in of_prompt.values():
        prompt_tokens = int(batch.scored[indices[0]].rollout.prompt.token_ids.size)
        answers = [batch.scored[index].rollout.num_tokens - 1 for index in indices]
        for part in packed_rows(answers, max(max_tokens - prompt_tokens, 0)):
            groups.append([indices[place] for place in part])
            lengths.append(prompt_tokens + sum(answers[place] for place in part))
    return [[groups[place] for place in row] for row in packed_rows(lengths, max_tokens)]


def _groups(tokens: Sequence[int], max_tokens: int, *, packed: bool) -> list[list[int]]:
    lengths = [count - 1 for count in tokens]  # the last token is a target only
    return packed_rows(lengths, max_tokens) if packed else padded_batches(lengths, max_tokens)


def _lay_out(
    flat: FlatRollouts,
    rows: Sequence[int],
    rollouts: Sequence[int],
    weights_S: Tensor,
    rewards_S: Tensor,
    places: "_Places",
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
    slot_N, index_N = spans(flat.starts_S[chosen] + prompt_S, response_S), places.predicted_at_R
    if flat.is_unsampled_F is not None:
        is_sampled = ~flat.is_unsampled_F[slot_N]
        slot_N, index_N = slot_N[is_sampled], index_N[is_sampled]
    loss_S = flat.loss_tokens_S[chosen]
    no_teacher_S = np.zeros(len(chosen), dtype=np.bool_)
    by_teacher_S = no_teacher_S if flat.by_teacher_S is None else flat.by_teacher_S[chosen]

    def moved(values: Counts) -> Tensor:
        return to_device(torch.from_numpy(values), device)

    input_place, (height, width) = moved(places.place_I), places.shape

    def padded(values: Tensor) -> Tensor:
        empty = torch.zeros(height * width, dtype=torch.int64, device=device)
        return empty.index_copy_(0, input_place, values.long()).view(height, width)

    target_N, row_N = moved(slot_N), moved(np.repeat(chosen, loss_S))
    common: dict[str, Any] = {
        "rollouts": tuple(rollouts),
        "input_BT": padded(flat.token_id_F.index_select(0, moved(places.slot_I))),
        "position_BT": padded(moved(places.position_I)),
        "sequence_tokens": tuple(places.inputs_S.tolist()),
        "shared": places.shared,
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
    if flat.span_logprob_F is not None and flat.is_span_start_F is not None:
        starts_N = flat.is_span_start_F[slot_N]
        return _of_spans(flat.span_logprob_F, slot_N, starts_N, loss_S, common)
    return _of_score_kind(flat, target_N, common)


def _of_spans(
    span_logprob_F: Tensor,
    slot_N: Counts,
    is_start_N: Flags,
    loss_S: Counts,
    common: dict[str, Any],
) -> AlignedMicroBatch:
    """Build the micro-batch of rollouts that are scored by spans.

    Args:
        slot_N: of the loss tokens, in the flat rollouts.
        is_start_N: whether a span begins at each.
        loss_S: loss tokens of each rollout.
    """
    device = span_logprob_F.device
    starts_P = np.flatnonzero(is_start_N)
    slot_P = to_device(torch.from_numpy(slot_N[starts_P]), device)
    tokens_P = np.diff(starts_P, append=len(slot_N))
    first_S = np.cumsum(loss_S) - loss_S
    return AlignedMicroBatch(
        **common,
        span_tokens_P=to_device(torch.from_numpy(tokens_P), device),
        span_logprob_P=span_logprob_F.index_select(0, slot_P),
        spans_per_sequence=tuple(np.add.reduceat(is_start_N, first_S, dtype=np.int64).tolist()),
    )


def _of_score_kind(flat: FlatRollouts, target_N: Tensor, common: dict[str, Any]) -> MicroBatch:
    """Build the micro-batch class that holds all of the teacher's values per token in ``flat``."""
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


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Where tokens stand: I input tokens, R response tokens, both in the order of the rollouts."""

    shape: tuple[int, int]
    """(B, T)."""
    inputs_S: Counts
    """Input tokens of each rollout."""
    slot_I: Counts
    """In the flat rollouts."""
    place_I: Counts
    """In the flattened [B, T]."""
    position_I: Counts
    """In the token's own sequence."""
    predicted_at_R: Counts
    """Where in the flattened [B, T] each response token is predicted."""
    shared: tuple[SharedPrompt, ...] | None = None


def _places(flat: FlatRollouts, rows: Counts, *, packed: bool) -> _Places:
    """Give every rollout of ``rows`` its own prompt."""
    prompt_S, response_S = flat.prompt_tokens_S[rows], flat.response_tokens_S[rows]
    inputs_S = prompt_S + response_S - 1
    if packed:
        shape, places_S = (1, int(inputs_S.sum())), np.cumsum(inputs_S) - inputs_S
    else:
        shape = (len(inputs_S), int(inputs_S.max()))
        places_S = shape[1] * np.arange(len(inputs_S))
    return _Places(
        shape=shape,
        inputs_S=inputs_S,
        slot_I=spans(flat.starts_S[rows], inputs_S),
        place_I=spans(places_S, inputs_S),
        position_I=spans(np.zeros_like(inputs_S), inputs_S),
        predicted_at_R=spans(places_S + prompt_S - 1, response_S),
    )


def _shared_places(flat: FlatRollouts, sizes: Sequence[int]) -> _Places:
    """Lay all rollouts out in one row, every ``sizes`` of them behind one prompt.

    The prompt is taken from a group's first rollout. The first token of all of its answers is
    predicted at the prompt's last position.
    """
    sizes_G = np.asarray(sizes)
    prompt_S, response_S = flat.prompt_tokens_S, flat.response_tokens_S
    first_G = np.cumsum(sizes_G) - sizes_G
    skipped_S = prompt_S.copy()
    skipped_S[first_G] = 0
    inputs_S = prompt_S - skipped_S + response_S - 1
    places_S = np.cumsum(inputs_S) - inputs_S
    predicted_at_R = spans(places_S + prompt_S - skipped_S - 1, response_S)
    last_of_prompt_S = np.repeat((places_S + prompt_S - 1)[first_G], sizes_G)
    predicted_at_R[np.cumsum(response_S) - response_S] = last_of_prompt_S
    return _Places(
        shape=(1, int(inputs_S.sum())),
        inputs_S=inputs_S,
        slot_I=spans(flat.starts_S + skipped_S, inputs_S),
        place_I=spans(places_S, inputs_S),
        position_I=spans(skipped_S, inputs_S),
        predicted_at_R=predicted_at_R,
        shared=tuple(
            SharedPrompt(
                start=int(places_S[first]),
                prompt_tokens=int(prompt_S[first]),
                answer_tokens=tuple((response_S[first : first + size] - 1).tolist()),
            )
            for first, size in zip(first_G.tolist(), sizes_G.tolist(), strict=True)
        ),
    )
