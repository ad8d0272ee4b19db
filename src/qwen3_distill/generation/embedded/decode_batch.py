"""A batch of rows that are decoded together: they join, get a token each step, and leave.

Shape letters: B rows decoded together, T cached positions (left-padded), V vocabulary.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from qwen3_distill.generation.embedded.grouped_attention import (
    RowGroups,
    group_rows,
    use_grouped_attention,
)
from qwen3_distill.generation.embedded.sampling import RowSampler
from qwen3_distill.generation.partial_rollout import PartialRollout
from qwen3_distill.types import FinishReason, Prompt, Rollout, RolloutRequest


class DecodeRow:
    """A request that is being sampled, and the queue of the caller that waits for it.

    Args:
        outbox: gets one entry: the rollout, None if it was aborted, or the error that ended it.
    """

    def __init__(
        self, request: RolloutRequest, outbox: "asyncio.Queue[Rollout | Exception | None]"
    ) -> None:
        self.running = PartialRollout(request)
        self.is_over = False
        """Whether no caller waits for another token."""
        self._outbox = outbox

    @property
    def request(self) -> RolloutRequest:
        return self.running.request

    def append(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        eos_ids: frozenset[int],
        candidates: Sequence[Sequence[int]] = (),
    ) -> None:
        """Add tokens up to the last one of the rollout, and deliver it if that is among them."""
        room = self.request.sampling.max_new_tokens - self.running.num_tokens
        end = next((i for i, token in enumerate(tokens[:room], 1) if token in eos_ids), None)
        self.running.add(tokens[: end or room], logprobs[: end or room], candidates[: end or room])
        if end is not None:
            self.deliver(self.running.rollout(FinishReason.STOP))
        elif len(tokens) >= room:
            self.deliver(self.running.rollout(FinishReason.LENGTH))

    def deliver(self, result: Rollout | Exception | None) -> None:
        """End the row, unless it has ended."""
        if not self.is_over:
            self.is_over = True
            self._outbox.put_nowait(result)


class DecodeBatch:
    """Rows that share a key-value cache and get one token each per step.

    Every row's last token is in the cache's last column. A row that joins has a cache of its own,
    and the shorter of the two is padded on the left.
    """

    begins_together = False
    """Whether rows may join an empty batch only."""

    def __init__(
        self, model: PreTrainedModel, device: torch.device, eos_ids: frozenset[int]
    ) -> None:
        use_grouped_attention(model)
        self._model = model
        self._device = device
        self._eos_ids = eos_ids
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self._rows: list[DecodeRow] = []
        self._state: _State | None = None
        self._is_mixed = False
        """Whether rows joined later than the first ones: some are then much longer than others."""

    @property
    def rows(self) -> list[DecodeRow]:
        """The rows that have not ended."""
        return [row for row in self._rows if not row.is_over]

    @torch.inference_mode()
    def step(self, joining: Sequence[DecodeRow]) -> None:
        """Sample the next token of every row; for joining rows, the first one."""
        if joining:
            self._drop_finished()
        logits = [] if self._state is None else [self._next_logits(self._state)]
        if joining:
            logits.append(self._join(joining))
        assert self._state is not None, "a step needs rows"
        logits_BV = logits[0] if len(logits) == 1 else torch.cat(logits)
        self._state.last_B, logprobs_B = self._state.sampler.sample(logits_BV)
        count = max(row.request.num_candidates for row in self._rows)
        top_BK = logits_BV.topk(count, dim=-1).indices.tolist() if count else [()] * len(self._rows)
        sampled = zip(
            self._rows, self._state.last_B.tolist(), logprobs_B.tolist(), top_BK, strict=True
        )
        for row, token, logprob, candidates in sampled:
            if not row.is_over:
                row.append([token], [logprob], self._eos_ids, [candidates])
        # Dropping rows copies the cache, so it is done when a quarter of them is finished.
        if len(self.rows) <= 0.75 * len(self._rows):
            self._drop_finished()

    def _next_logits(self, state: "_State") -> Tensor:
        """Return [B, V] logits after each row's last token; that token enters the cache."""
        state.mask_BT = pad(state.mask_BT, (0, 1), value=1)
        groups = group_rows([_cached_tokens(row) for row in self._rows]) if self._is_mixed else None
        return _forward(self._model, state.last_B.unsqueeze(1), state.mask_BT, state.cache, groups)

    def _drop_finished(self) -> None:
        alive = [index for index, row in enumerate(self._rows) if not row.is_over]
        if not alive:
            self.clear()
        elif self._state is not None and len(alive) < len(self._rows):
            self._rows = [self._rows[index] for index in alive]
            self._state.select(alive)

    def _join(self, joining: Sequence[DecodeRow]) -> Tensor:
        """Prefill joining rows; return [B, V] logits of their first tokens."""
        prompts = [row.request.prompt for row in joining]
        logits_BV, cache, mask_BT = prefill(self._model, self._device, prompts)
        sampler = RowSampler([row.request.sampling for row in joining], self._device)
        last_B = torch.zeros(len(joining), dtype=torch.long, device=self._device)
        joined = _State(cache, mask_BT, sampler, last_B)
        if self._state is None:
            self._state = joined
        else:
            self._state.trim(max(_cached_tokens(row) for row in self._rows))
            self._state.join(joined)
            self._is_mixed = True
        self._rows = [*self._rows, *joining]
        return logits_BV


def prefill(
    model: PreTrainedModel, device: torch.device, prompts: Sequence[Prompt]
) -> tuple[Tensor, Cache, Tensor]:
    """Return [B, V] logits after each prompt, the cache, and the [B, T] attention mask.

    Adjacent rows of one prompt share its forward pass.
    """
    distinct: list[Prompt] = []
    row_to_distinct: list[int] = []
    for prompt in prompts:
        if not distinct or not np.array_equal(prompt.token_ids, distinct[-1].token_ids):
            distinct.append(prompt)
        row_to_distinct.append(len(distinct) - 1)
    longest = max(prompt.token_ids.size for prompt in distinct)
    ids_BT = torch.zeros(len(distinct), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(distinct), longest, dtype=torch.long)
    for row, prompt in enumerate(distinct):
        # Left padding: every row's last prompt token, whose logits start the response, and
        # every new token stand in the same column.
        ids_BT[row, longest - prompt.token_ids.size :] = torch.from_numpy(
            prompt.token_ids.astype(np.int64)
        )
        mask_BT[row, longest - prompt.token_ids.size :] = 1
    # Layers that keep every position, so that caches can be joined: a sliding window, where a
    # model has one, is in the attention mask.
    cache = Cache(layer_class_to_replicate=_RoomyLayer)
    mask_BT = mask_BT.to(device)
    logits_BV = _forward(model, ids_BT.to(device), mask_BT, cache)
    if len(distinct) < len(prompts):
        index = torch.tensor(row_to_distinct, device=device)
        cache.batch_select_indices(index)
        logits_BV, mask_BT = logits_BV[index], mask_BT[index]
    return logits_BV, cache, mask_BT


def _forward(
    model: PreTrainedModel,
    ids_BT: Tensor,
    mask_BT: Tensor,
    cache: Cache,
    groups: RowGroups | None = None,
) -> Tensor:
    """[B, V] logits after the last of the new positions ``ids_BT``; extends the cache."""
    position_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
    return next_token_logits(model, ids_BT, mask_BT, position_BT, cache, groups)


class _RoomyLayer(DynamicLayer):
    """Keys and values with spare columns: a new token does not copy all earlier ones."""

    _ROOM = 64
    """Columns allocated beyond those in use."""
    _key_buffer: Tensor | None = None
    _value_buffer: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, heads, T, D] of new positions; return those of all positions, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self._key_buffer = self._with_capacity(_held(self.keys), key_states, self._key_buffer)
        self._value_buffer = self._with_capacity(
            _held(self.values), value_states, self._value_buffer
        )
        length = _held(self.keys).shape[2] + key_states.shape[2]
        self.keys, self.values = self._key_buffer[:, :, :length], self._value_buffer[:, :, :length]
        return self.keys, self.values

    def _with_capacity(self, held: Tensor, new: Tensor, buffer: Tensor | None) -> Tensor:
        """Return a tensor that begins with the held columns, followed by the new ones."""
        old, length = held.shape[2], held.shape[2] + new.shape[2]
        # What was selected, trimmed or joined in between is another tensor.
        is_same = buffer is not None and held.data_ptr() == buffer.data_ptr()
        if buffer is None or not is_same or len(buffer) != len(held) or buffer.shape[2] < length:
            buffer = new.new_empty(*new.shape[:2], length + self._ROOM, new.shape[3])
            buffer[:, :, :old] = held
        buffer[:, :, old:length] = new
        return buffer


class _State:
    """The state of a batch's rows on the device."""

    def __init__(self, cache: Cache, mask_BT: Tensor, sampler: RowSampler, last_B: Tensor) -> None:
        self.cache = cache
        self.mask_BT = mask_BT
        self.sampler = sampler
        self.last_B = last_B
        """Each row's last token, which is not in the cache yet; set by the first step."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the rows."""
        index = torch.tensor(rows, device=self.mask_BT.device)
        self.cache.batch_select_indices(index)
        self.mask_BT, self.last_B = self.mask_BT[index], self.last_B[index]
        self.sampler = self.sampler.select(rows)

    def trim(self, num_columns: int) -> None:
        """Drop leading columns; the last ``num_columns`` hold every row's tokens."""
        self.mask_BT = self.mask_BT[:, -num_columns:]
        for layer in _layers(self.cache):
            layer.keys = _held(layer.keys)[:, :, -num_columns:]
            layer.values = _held(layer.values)[:, :, -num_columns:]

    def join(self, other: "_State") -> None:
        """Append another batch's rows."""
        self.mask_BT = _stacked(self.mask_BT.unsqueeze(-1), other.mask_BT.unsqueeze(-1)).squeeze(-1)
        for ours, theirs in zip(_layers(self.cache), _layers(other.cache), strict=True):
            ours.keys = _stacked(_held(ours.keys), _held(theirs.keys))
            ours.values = _stacked(_held(ours.values), _held(theirs.values))
        self.last_B = torch.cat([self.last_B, other.last_B])
        self.sampler = self.sampler.joined(other.sampler)


def _layers(cache: Cache) -> list[DynamicLayer]:
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]


def _held(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a cache holds its prompts from the first forward pass on"
    return tensor


def _stacked(upper: Tensor, lower: Tensor) -> Tensor:
    """Concatenate the rows of both, [B, ..., T, D]; zeros pad the shorter at the front of T."""
    longest = max(upper.shape[-2], lower.shape[-2])
    return torch.cat([pad(part, (0, 0, longest - part.shape[-2], 0)) for part in (upper, lower)])


def _cached_tokens(row: DecodeRow) -> int:
    """Columns that a row needs when its last token has entered the cache."""
    return row.request.prompt.token_ids.size + row.running.num_tokens


def next_token_logits(
    model: PreTrainedModel,
    ids_BT: Tensor,
    mask_BT: Tensor,
    position_BT: Tensor,
    cache: Cache,
    groups: RowGroups | None,
) -> Tensor:
    """One cached forward pass; the head is applied to the last position only."""
    return model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=position_BT,
        past_key_values=cache,
        row_groups=groups,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
