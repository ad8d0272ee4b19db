"""Attention for a batch of rows of different lengths: each group reads only its own columns.

A left-padded cache is as wide as its longest row. A decode step that reads all of it for every row
spends most of its time on padding when short rows share a batch with long ones.

Shape letters: B rows, H query heads, J key-value heads, T cached positions, D size of a head.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

RowGroups: TypeAlias = Sequence[tuple[slice, int]]
"""Consecutive rows and the number of last cache columns that hold all their tokens."""

_NAME = "qwen3_distill_grouped"
_MAX_GROUPS = 4
_MIN_ROWS = 8
"""A smaller group costs more than the padding it saves."""


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Make the model accept ``row_groups`` in its forward pass; without them nothing changes."""
    AttentionInterface.register(_NAME, grouped_attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def group_rows(num_tokens: Sequence[int]) -> RowGroups:
    """Split consecutive rows into groups of about equal size.

    Args:
        num_tokens: per row, its tokens in the cache.
    """
    count = len(num_tokens)
    num_groups = max(1, min(_MAX_GROUPS, count // _MIN_ROWS))
    edges = [count * index // num_groups for index in range(num_groups + 1)]
    return [(slice(start, stop), max(num_tokens[start:stop])) for start, stop in pairwise(edges)]


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_groups: RowGroups | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' own attention; with ``row_groups``, a decode step's.

    Args:
        query: [B, H, 1, D] with groups.
        key: [B, J, T, D], as `value`.
        attention_mask: [B, 1, 1, T], or None where there is no padding.
    """
    if row_groups is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    parts = []
    for rows, width in row_groups:
        # With one query position, the query heads that share a key-value head can stand in for
        # positions: keys and values need not be repeated.
        folded = query[rows].reshape(-1, key.shape[1], query.shape[1] // key.shape[1], key.shape[3])
        keys, values = key[rows, :, -width:], value[rows, :, -width:]
        mask = None if attention_mask is None else attention_mask[rows, :, :, -width:]
        if query.device.type == "cuda" and query.dtype == torch.float32:
            attended = attention_by_products(folded, keys, values, mask, scaling)
        else:
            attended = torch.nn.functional.scaled_dot_product_attention(
                folded, keys, values, attn_mask=mask, scale=scaling
            )
        parts.append(attended.reshape(-1, 1, query.shape[1], key.shape[3]))
    return torch.cat(parts), None


def attention_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Compute attention as two batched matrix products.

    For a decode step in float32 that is faster than PyTorch's fused kernel
    (benchmarks/results/h200_evidence_decode.json).

    Args:
        query: [B, J, Q, D], Q positions.
        key: [B, J, T, D], as `value`.
        mask: [B, 1, 1, T], bool (True where a position may be read) or added to the scores.
        scaling: of the scores; None is 1 / sqrt(D).

    Returns:
        [B, J, Q, D].
    """
    scores = (query * (scaling or query.shape[-1] ** -0.5)) @ key.transpose(2, 3)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1) @ value
