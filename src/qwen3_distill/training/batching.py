"""From records to padded tensors: the one place that shifts and pads.

Shape letters: B sequences of a micro-batch, T target positions (right-padded), N loss tokens in
row-major order, K teacher candidates, D teacher hidden size.

Position t of a row holds input token t and target token t + 1. The response's first target
therefore stands at the prompt's last position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_distill.errors import AlignmentError
from qwen3_distill.types import Batch, HiddenScore, Rollout, TeacherScore, TopKScore
from qwen3_distill.utils.packing import pack_by_tokens


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass. Values outside ``loss_mask_BT`` mean nothing."""

    input_BT: Tensor
    """int64 token ids."""
    target_BT: Tensor
    """int64 token ids, one position ahead of the input."""
    loss_mask_BT: Tensor
    """bool: the target is a response token."""
    behavior_logprob_BT: Tensor
    """float32 nats."""
    teacher_logprob_BT: Tensor
    """float32 nats."""
    importance_weight_B: Tensor
    """float32: w_i."""
    task_advantage_B: Tensor
    """float32, added to every token's advantage."""

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return type(self)(**moved)

    @property
    def tokens_per_row(self) -> list[int]:
        """Loss tokens of each row; they sum to N."""
        return self.loss_mask_BT.sum(dim=1).tolist()

    def per_token(self, per_row_B: Tensor) -> Tensor:
        """[N]: each row's value, repeated for its loss tokens."""
        return per_row_B.repeat_interleave(self.loss_mask_BT.sum(dim=1))


@dataclass(frozen=True, kw_only=True)
class TopKMicroBatch(MicroBatch):
    """With the teacher's candidates."""

    candidate_id_BTK: Tensor
    """int64."""
    candidate_logprob_BTK: Tensor
    """float32 nats, of the full distribution."""


@dataclass(frozen=True, kw_only=True)
class HiddenMicroBatch(MicroBatch):
    """With the teacher's last hidden states."""

    teacher_hidden_BTD: Tensor
    """float32."""


def micro_batches(batch: Batch, max_tokens: int) -> list[MicroBatch]:
    """Split a batch by padded size. How it is split changes memory and speed, not the step.

    Args:
        max_tokens: B x T of a micro-batch; a longer sequence gets one of its own.

    Raises:
        AlignmentError: the batch mixes kinds of teacher score.
    """
    lengths = [s.rollout.prompt.token_ids.size + s.rollout.num_tokens - 1 for s in batch.scored]
    return [collate(batch, group) for group in pack_by_tokens(lengths, max_tokens)]


def collate(batch: Batch, indices: Sequence[int]) -> MicroBatch:
    """Pad the batch's rollouts ``indices`` into one micro-batch."""
    chosen = [batch.scored[index] for index in indices]
    rollouts = [scored.rollout for scored in chosen]
    scores = [scored.score for scored in chosen]
    kinds = {type(score) for score in scores}
    if len(kinds) != 1:
        names = sorted(kind.__name__ for kind in kinds)
        raise AlignmentError(f"one batch holds scores of several kinds: {', '.join(names)}")
    pad = _Padder(rollouts)
    index = np.asarray(indices)
    common = {
        "input_BT": pad.sequences(lambda ids: ids[:-1]),
        "target_BT": pad.sequences(lambda ids: ids[1:]),
        "loss_mask_BT": pad.responses([np.ones(r.num_tokens, dtype=np.bool_) for r in rollouts]),
        "behavior_logprob_BT": pad.responses([r.behavior_logprobs for r in rollouts]),
        "teacher_logprob_BT": pad.responses([score.logprobs for score in scores]),
        "importance_weight_B": torch.from_numpy(batch.importance_weights[index]),
        "task_advantage_B": torch.from_numpy(batch.task_advantages[index]),
    }
    return _with_teacher_detail(pad, scores, common)


def _with_teacher_detail(
    pad: "_Padder", scores: Sequence[TeacherScore], common: dict[str, Tensor]
) -> MicroBatch:
    if all(isinstance(score, TopKScore) for score in scores):
        top_k = [score for score in scores if isinstance(score, TopKScore)]
        return TopKMicroBatch(
            **common,
            candidate_id_BTK=pad.responses([s.candidate_ids.astype(np.int64) for s in top_k]),
            candidate_logprob_BTK=pad.responses([s.candidate_logprobs for s in top_k]),
        )
    if all(isinstance(score, HiddenScore) for score in scores):
        hidden = [score for score in scores if isinstance(score, HiddenScore)]
        return HiddenMicroBatch(
            **common, teacher_hidden_BTD=pad.responses([s.hidden for s in hidden])
        )
    return MicroBatch(**common)


class _Padder:
    """Right-pads rows to the longest; knows where each row's response targets stand."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self._rollouts = rollouts
        self._ids = [
            np.concatenate([r.prompt.token_ids, r.response_ids]).astype(np.int64) for r in rollouts
        ]
        self._width = max(ids.size for ids in self._ids) - 1

    def sequences(self, part: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> Tensor:
        out = np.zeros((len(self._ids), self._width), dtype=np.int64)
        for row, ids in enumerate(self._ids):
            values = part(ids)
            out[row, : values.size] = values
        return torch.from_numpy(out)

    def responses(self, per_rollout: Sequence[NDArray[np.generic]]) -> Tensor:
        """[B, T, ...] with each rollout's [R, ...] values at its response targets."""
        first = per_rollout[0]
        out = np.zeros((len(per_rollout), self._width, *first.shape[1:]), dtype=first.dtype)
        for row, (rollout, values) in enumerate(zip(self._rollouts, per_rollout, strict=True)):
            start = rollout.prompt.token_ids.size - 1
            out[row, start : start + rollout.num_tokens] = values
        return torch.from_numpy(out)
