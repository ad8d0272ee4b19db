"""A batch whose rows begin together and keep their places until the last has ended.

Every tensor keeps its shape and place from step to step, so on CUDA a step is captured as a graph
and replayed: a small model's decode step takes longer to launch than to compute. A step reads the
first columns only, up to a multiple; there is a graph for each.

Shape letters: B rows (the batch's, filled up to a multiple), T cached positions (left-padded),
J key-value heads, D size of a head, S steps between two reads of the tokens, K candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from qwen3_distill.generation.embedded.decode_batch import (
    DecodeRow,
    next_token_logits,
    prefill,
)
from qwen3_distill.generation.embedded.grouped_attention import use_grouped_attention
from qwen3_distill.generation.embedded.sampling import RowSampler, SamplingFeatures
from qwen3_distill.types import SamplingSpec

_STEPS_PER_READ = 8
"""A read waits for the device. A row that ends between two reads samples up to this many tokens
less one in vain."""
_ROWS, _COLUMNS = 16, 64
"""Batches are filled up to multiples, so that few shapes are captured."""
_KEPT_SHAPES = 4
_MAX_WIDTHS = 8
"""Graphs of a shape: each is captured by three steps and takes memory."""
_IDLE = SamplingSpec(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=1, seed=0)
"""The request of a row that only fills the batch up; its tokens are not read."""


@dataclass(frozen=True)
class _Shape:
    num_rows: int
    num_columns: int
    uses: SamplingFeatures
    num_candidates: int


class _Sampled(NamedTuple):
    """A list per row of what was sampled since the last read."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    candidates: list[list[list[int]]]


class StaticBatch:
    """Rows that share a key-value cache of a fixed size; used as a `DecodeBatch` is."""

    begins_together = True
    """Whether rows may join an empty batch only."""

    def __init__(
        self, model: PreTrainedModel, device: torch.device, eos_ids: frozenset[int]
    ) -> None:
        use_grouped_attention(model)
        self._model = model
        self._device = device
        self._eos_ids = eos_ids
        self._kept: dict[_Shape, _Steps] = {}
        self._steps: _Steps | None = None
        self._rows: list[DecodeRow] = []

    def clear(self) -> None:
        """Forget all rows. What was captured stays."""
        self._rows, self._steps = [], None

    @property
    def rows(self) -> list[DecodeRow]:
        """The rows that have not ended."""
        return [row for row in self._rows if not row.is_over]

    @torch.inference_mode()
    def step(self, joining: Sequence[DecodeRow]) -> None:
        """Sample the first token of joining rows, or the next few tokens of every row."""
        if joining:
            sampled = self._begin(joining)
        else:
            assert self._steps is not None, "a step needs rows"
            sampled = self._steps.advance()
        for row, tokens, values, candidates in zip(self._rows, *sampled, strict=False):
            if not row.is_over:
                row.append(tokens, values, self._eos_ids, candidates)
        if not self.rows:
            self.clear()

    def _begin(self, joining: Sequence[DecodeRow]) -> _Sampled:
        """Prefill rows into a cache of their shape; sample their first tokens."""
        assert not self.rows, "rows join an empty batch only"
        specs = [row.request.sampling for row in joining]
        prompts = [row.request.prompt for row in joining]
        longest = max(prompt.token_ids.size for prompt in prompts)
        new_tokens = max(spec.max_new_tokens for spec in specs) + _STEPS_PER_READ
        shape = _Shape(
            _multiple(len(joining), _ROWS),
            _multiple(longest + new_tokens, _COLUMNS),
            SamplingFeatures.of(specs),
            max(row.request.num_candidates for row in joining),
        )
        logits_BV, cache, mask_BT = prefill(self._model, self._device, prompts)
        self._rows, self._steps = list(joining), self._steps_of(shape)
        return self._steps.begin(specs, logits_BV, cache, mask_BT)

    def _steps_of(self, shape: _Shape) -> "_Steps":
        """The tensors and, on CUDA, the graph of a shape; those not used for longest are freed."""
        steps = self._kept.pop(shape, None)
        if steps is None:
            while len(self._kept) >= _KEPT_SHAPES:
                self._kept.pop(next(iter(self._kept)))
            steps = _Steps(self._model, self._device, shape)
        self._kept[shape] = steps
        return steps


class _Steps:
    """All tensors of one shape, and the decode step that changes them in place."""

    def __init__(self, model: PreTrainedModel, device: torch.device, shape: _Shape) -> None:
        self._model, self._device, self._shape = model, device, shape
        rows, columns, dtype = shape.num_rows, shape.num_columns, model.dtype
        config: Any = model.config
        heads, size = config.num_key_value_heads, config.head_dim
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        """The column that the next token enters."""
        layers = [
            _FixedLayer(
                torch.zeros(rows, heads, columns, size, dtype=dtype, device=device),
                torch.zeros(rows, heads, columns, size, dtype=dtype, device=device),
                self._column,
            )
            for _ in range(config.num_hidden_layers)
        ]
        self._layers = layers
        every: Any = layers  # a list of any layers, to the type checker
        self._cache = Cache(layers=every)
        self._mask_BT = torch.full((rows, columns), -torch.inf, dtype=dtype, device=device)
        """Added to the attention's scores: 0 where a row has a token, else -inf."""
        self._position_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._last_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._ids_BS = torch.zeros(rows, _STEPS_PER_READ, dtype=torch.long, device=device)
        self._logprobs_BS = torch.zeros(rows, _STEPS_PER_READ, device=device)
        self._top_BSK = torch.zeros(
            rows, _STEPS_PER_READ, shape.num_candidates, dtype=torch.long, device=device
        )
        self._slot = torch.zeros(1, dtype=torch.long, device=device)
        self._sampler = self._sampler_of([_IDLE] * rows)
        self._sampler.uses = shape.uses
        self._num_filled = 0
        """Columns that hold tokens; the next token enters the one behind them."""
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        """By the number of columns that a step reads."""
        if device.type == "cuda":
            self._capture()

    def begin(
        self, specs: Sequence[SamplingSpec], logits_BV: Tensor, cache: Cache, mask_BT: Tensor
    ) -> _Sampled:
        """Put prefilled rows into the tensors and sample their first tokens."""
        num_rows, longest = mask_BT.shape
        prefilled: Any = cache.layers
        for own, new in zip(self._layers, prefilled, strict=True):
            assert new.keys is not None, "a prefill fills every layer"
            assert new.values is not None, "a prefill fills every layer"
            own.key_buffer[:num_rows, :, :longest] = new.keys
            own.value_buffer[:num_rows, :, :longest] = new.values
        self._mask_BT.fill_(-torch.inf)
        self._mask_BT[:num_rows, :longest].masked_fill_(mask_BT.bool(), 0.0)
        self._column.fill_(longest)
        self._num_filled = longest
        self._position_B1.zero_()
        self._position_B1[:num_rows, 0] = mask_BT.sum(dim=1)
        idle = [_IDLE] * (self._shape.num_rows - num_rows)
        self._sampler.copy_(self._sampler_of([*specs, *idle]))
        of_all_BV = logits_BV.new_zeros(self._shape.num_rows, logits_BV.shape[1])
        of_all_BV[:num_rows] = logits_BV
        ids_B, logprobs_B = self._sampler.sample(of_all_BV)
        self._last_B1.copy_(ids_B.unsqueeze(1))
        self._slot.zero_()
        return _Sampled(
            ids_B.unsqueeze(1).tolist(),
            logprobs_B.unsqueeze(1).tolist(),
            self._most_likely(of_all_BV).unsqueeze(1).tolist(),
        )

    def advance(self) -> _Sampled:
        """Sample S tokens of every row."""
        for _ in range(_STEPS_PER_READ):
            self._num_filled += 1
            width = self._width(self._num_filled)
            if self._graphs:
                self._graphs[width].replay()
            else:
                self._step(width)
        self._slot.zero_()
        return _Sampled(self._ids_BS.tolist(), self._logprobs_BS.tolist(), self._top_BSK.tolist())

    def _width(self, num_filled: int) -> int:
        """Return the columns that a step reads, of which so many hold tokens."""
        columns = self._shape.num_columns
        return min(_multiple(num_filled, _multiple(-(-columns // _MAX_WIDTHS), _COLUMNS)), columns)

    def _most_likely(self, logits_BV: Tensor) -> Tensor:
        """[B, K] token ids, most likely first."""
        return logits_BV.topk(self._shape.num_candidates, dim=-1).indices

    def _sampler_of(self, specs: Sequence[SamplingSpec]) -> RowSampler:
        return RowSampler(specs, self._device, num_tokens=self._shape.num_columns)

    def _step(self, width: int) -> None:
        """Put every row's last token into the cache and sample the next, all in place.

        Args:
            width: the columns to read; the later ones hold no token.
        """
        self._mask_BT.index_fill_(1, self._column, 0.0)
        for layer in self._layers:
            layer.width = width
        logits_BV = next_token_logits(
            self._model,
            self._last_B1,
            self._mask_BT[:, None, None, :width],
            self._position_B1,
            self._cache,
            [(slice(None), width)],
        )
        ids_B, logprobs_B = self._sampler.sample(logits_BV)
        self._last_B1.copy_(ids_B.unsqueeze(1))
        self._ids_BS.index_copy_(1, self._slot, ids_B.unsqueeze(1))
        self._logprobs_BS.index_copy_(1, self._slot, logprobs_B.unsqueeze(1))
        self._top_BSK.index_copy_(1, self._slot, self._most_likely(logits_BV).unsqueeze(1))
        for counter in (self._column, self._position_B1, self._slot):
            counter.add_(1)

    def _capture(self) -> None:
        """Capture a step for every width; what that leaves in the tensors, `begin` overwrites.

        The graphs share memory: one runs at a time, and what outlasts it has tensors of its own.
        """
        pool = torch.cuda.graph_pool_handle()
        for width in sorted({self._width(n) for n in range(1, self._shape.num_columns + 1)}):
            side = torch.cuda.Stream(self._device)
            side.wait_stream(torch.cuda.current_stream(self._device))
            self._column.zero_()
            self._slot.zero_()
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries allocate and choose kernels at their first calls
                    self._step(width)
            torch.cuda.current_stream(self._device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._step(width)
            self._graphs[width] = graph


class _FixedLayer(DynamicLayer):
    """Keys and values of all columns; new ones are written in place, the first `width` are read."""

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.key_buffer, self.value_buffer, self._column = keys, values, column
        self.width = keys.shape[2]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, J, 1, D] of the new position; return those of the columns to read."""
        self.key_buffer.index_copy_(2, self._column, key_states)
        self.value_buffer.index_copy_(2, self._column, value_states)
        return self.key_buffer[:, :, : self.width], self.value_buffer[:, :, : self.width]


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of
