"""Attention over a packed row in one launch, by PyTorch's flash kernel for uneven lengths.

Every sequence of the row has queries, which stand one behind another, and keys, which may be those
of other places too: an answer's keys are its prompt's and its own. The last query of a sequence
sees all of its keys, the one before all but one. CUDA and 16-bit numbers only.

Shape letters: T places of the row, S places of all keys, H heads, G heads of keys and values, D
dimensions of a head, N sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen3_distill.modeling.host_to_device import to_device
from qwen3_distill.training.batching import SharedPrompt

_DTYPES = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256
_FIRST_CAPABILITY = (8, 0)
"""CUDA compute capability from which there is a flash kernel (Ampere)."""


@dataclass(frozen=True, kw_only=True)
class FlashRow:
    """The sequences of one row, on its device; for all layers."""

    query_ends: Tensor
    """[N + 1] int32: where each sequence's queries begin and end, in the row."""
    key_ends: Tensor
    """[N + 1] int32: likewise its keys, among all keys."""
    query_size: Tensor
    """[queries of the longest sequence]: a number that a compiler keeps open, as it does the sizes
    of tensors but not numbers that reach an autograd function. What is in it is not read."""
    key_size: Tensor
    """[keys of the longest sequence], likewise."""
    key_place_S: Tensor | None
    """int64: the place in the row of every key; None: keys are where the queries are."""

    def attend(self, query_HTD: Tensor, key_GTD: Tensor, value_GTD: Tensor, scale: float) -> Tensor:
        """Return [H, T, D], the attention's output at every place of the row."""
        query_THD, key_SGD, value_SGD = (
            values.transpose(0, 1) for values in (query_HTD, key_GTD, value_GTD)
        )
        if self.key_place_S is not None:
            key_SGD = _Gathered.apply(key_SGD, self.key_place_S)
            value_SGD = _Gathered.apply(value_SGD, self.key_place_S)
        # A compiler follows tensors that are arguments themselves, not those in an argument.
        out_THD: Any = _Flash.apply(
            query_THD.contiguous(),
            key_SGD.contiguous(),
            value_SGD.contiguous(),
            self.query_ends,
            self.key_ends,
            self.query_size,
            self.key_size,
            scale,
        )
        return out_THD.transpose(0, 1)


def flash_row(shared: Sequence[SharedPrompt], device: torch.device) -> FlashRow:
    """Return the sequences of a row: every prompt, and every answer behind its prompt."""
    queries, keys, places = list[int](), list[int](), list[Tensor]()
    for group in shared:
        prompt = torch.arange(group.start, group.start + group.prompt_tokens)
        queries.append(group.prompt_tokens)
        keys.append(group.prompt_tokens)
        places.append(prompt)
        start = group.start + group.prompt_tokens
        for tokens in group.answer_tokens:
            if tokens == 0:  # its one token is a target only
                continue
            queries.append(tokens)
            keys.append(group.prompt_tokens + tokens)
            places += [prompt, torch.arange(start, start + tokens)]
            start += tokens
    return FlashRow(
        query_ends=_placed(_ends(queries), device),
        key_ends=_placed(_ends(keys), device),
        query_size=_open(torch.empty(max(queries), dtype=torch.uint8, device=device)),
        key_size=_open(torch.empty(max(keys), dtype=torch.uint8, device=device)),
        key_place_S=None if queries == keys else _placed(torch.cat(places), device),
    )


def flash_runs(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether the kernel computes attention of this dtype and size on the device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    fits = head_size <= _LARGEST_HEAD and head_size % 8 == 0 and dtype in _DTYPES
    return fits and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY


def _placed(values: Tensor, device: torch.device) -> Tensor:
    return _open(to_device(values, device))


def _open(values: Tensor) -> Tensor:
    """Keep a compiler from beginning anew for every size of it."""
    torch._dynamo.maybe_mark_dynamic(values, 0)  # pyright: ignore[reportPrivateImportUsage]
    return values


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


class _Gathered(torch.autograd.Function):
    """Rows at some places, with a gradient that is added up in float32."""

    @staticmethod
    def forward(ctx: Any, values_TGD: Tensor, place_S: Tensor) -> Tensor:
        ctx.save_for_backward(place_S)
        ctx.size = values_TGD.shape
        return values_TGD.index_select(0, place_S)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient_SGD,) = gradients
        (place_S,) = ctx.saved_tensors
        dtype = torch.promote_types(gradient_SGD.dtype, torch.float32)
        total = torch.zeros(ctx.size, dtype=dtype, device=gradient_SGD.device)
        total.index_add_(0, place_S, gradient_SGD.to(dtype))
        return total.to(gradient_SGD.dtype), None


class _Flash(torch.autograd.Function):
    """PyTorch's flash kernel as it is: its wrapper in 2.11 wants as many heads of keys as of
    queries."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        query_size: Tensor,
        key_size: Tensor,
        scale: float,
    ) -> Tensor:
        out, logsumexp, random_state, unused, _ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            query_ends,
            key_ends,
            query_size.shape[0],
            key_size.shape[0],
            0.0,
            True,
            return_debug_mask=False,
            scale=scale,
        )
        of_row = (query_ends, key_ends, query_size, key_size)
        ctx.save_for_backward(query, key, value, out, logsumexp, *of_row, random_state, unused)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *kept, query_ends, key_ends, query_size, key_size, random_state, unused = ctx.saved_tensors
        found = torch.ops.aten._flash_attention_backward(
            gradients[0].contiguous(),
            *kept,
            query_ends,
            key_ends,
            query_size.shape[0],
            key_size.shape[0],
            0.0,
            True,
            random_state,
            unused,
            scale=ctx.scale,
        )
        return (*found, None, None, None, None, None)
