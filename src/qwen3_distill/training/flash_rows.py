"""Attention over a packed row in one launch, by PyTorch's flash kernel for uneven lengths.

Every sequence of the row has queries, which stand one behind another, and keys, which may be those
of other places too: an answer's keys are its prompt's and its own. The last query of a sequence
sees all of its keys, the one before all but one. CUDA and 16-bit numbers only.

Shape letters: T places of the row, S places of all keys, Q places of prompts, C copies of one, H
heads, G heads of keys and values, D dimensions of a head, N sequences.
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
    copied: "CopiedKeys | None"
    """None: keys are where the queries are."""

    def attend(self, query_HTD: Tensor, key_GTD: Tensor, value_GTD: Tensor, scale: float) -> Tensor:
        """Return [H, T, D], the attention's output at every place of the row."""
        query_THD, key_SGD, value_SGD = (
            values.transpose(0, 1) for values in (query_HTD, key_GTD, value_GTD)
        )
        if self.copied is not None:
            key_SGD, value_SGD = map(self.copied.of, (key_SGD, value_SGD))
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


@dataclass(frozen=True, kw_only=True)
class CopiedKeys:
    """Where the keys of a row stand among all keys: a prompt's before each of its answers too."""

    place_S: Tensor
    """int64: the place in the row of every key."""
    own_T: Tensor
    """int64: where each place's key stands first."""
    prompt_Q: Tensor
    """int64: the places in the row of all prompts' tokens."""
    copies_QC: Tensor
    """int64: where the key of each of them stands; behind the last, any place."""
    is_copy_QC: Tensor
    """bool: False behind the last."""

    def of(self, values_TGD: Tensor) -> Tensor:
        """Return [S, G, D] of values of the row."""
        out: Any = _Copied.apply(
            values_TGD, self.place_S, self.own_T, self.prompt_Q, self.copies_QC, self.is_copy_QC
        )
        return out


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
        copied=None if queries == keys else _copied(shared, torch.cat(places), device),
    )


def _copied(shared: Sequence[SharedPrompt], place_S: Tensor, device: torch.device) -> CopiedKeys:
    # Stable: the first of equal places comes first.
    order_S = place_S.argsort(stable=True)
    count_T = place_S.bincount()
    first_T = count_T.cumsum(0) - count_T
    prompt_Q = torch.cat(
        [torch.arange(group.start, group.start + group.prompt_tokens) for group in shared]
    )
    copy_C = torch.arange(int(count_T.max()))
    is_copy_QC = copy_C < count_T[prompt_Q, None]
    copies_QC = order_S[(first_T[prompt_Q, None] + copy_C).where(is_copy_QC, 0)]
    return CopiedKeys(
        place_S=_placed(place_S, device),
        own_T=_placed(order_S[first_T], device),
        prompt_Q=_placed(prompt_Q, device),
        copies_QC=_placed(copies_QC, device, 0, 1),
        is_copy_QC=_placed(is_copy_QC, device, 0, 1),
    )


def flash_runs(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether the kernel computes attention of this dtype and size on the device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    fits = head_size <= _LARGEST_HEAD and head_size % 8 == 0 and dtype in _DTYPES
    return fits and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY


def _placed(values: Tensor, device: torch.device, *dimensions: int) -> Tensor:
    return _open(to_device(values, device), *dimensions)


def _open(values: Tensor, *dimensions: int) -> Tensor:
    """Keep a compiler from beginning anew for every size of it; the first one, if none is named."""
    for dimension in dimensions or (0,):
        torch._dynamo.maybe_mark_dynamic(values, dimension)  # pyright: ignore[reportPrivateImportUsage]
    return values


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


class _Copied(torch.autograd.Function):
    """Values of a row where `CopiedKeys` says.

    The gradient is added up in float32, over the copies of a prompt only and in their order: the
    same every time, and less work than adding every key's to its place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values_TGD: Tensor,
        place_S: Tensor,
        own_T: Tensor,
        prompt_Q: Tensor,
        copies_QC: Tensor,
        is_copy_QC: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(own_T, prompt_Q, copies_QC, is_copy_QC)
        return values_TGD.index_select(0, place_S)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_SGD,) = gradients
        own_T, prompt_Q, copies_QC, is_copy_QC = ctx.saved_tensors
        found_QCGD = gradient_SGD.index_select(0, copies_QC.flatten()).unflatten(0, copies_QC.shape)
        dtype = torch.promote_types(gradient_SGD.dtype, torch.float32)
        total_QGD = found_QCGD.to(dtype).where(is_copy_QC[:, :, None, None], 0).sum(dim=1)
        own_TGD = gradient_SGD.index_select(0, own_T)
        found = own_TGD.index_copy(0, prompt_Q, total_QGD.to(gradient_SGD.dtype))
        return (found, None, None, None, None, None)


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
