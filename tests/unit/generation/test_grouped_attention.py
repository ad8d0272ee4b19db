"""Grouped attention against transformers' own."""

import pytest
import torch
from torch import Tensor, nn

from qwen3_distill.generation.embedded.grouped_attention import (
    attention_by_products,
    group_rows,
    grouped_attention,
)

HEADS, KV_HEADS, HEAD_SIZE = 6, 2, 8


class Layer(nn.Module):
    """What transformers' attention reads of a layer."""

    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


def inputs(num_tokens: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A decode step's query, keys, values and mask over a left-padded cache."""
    rows, width = len(num_tokens), max(num_tokens)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, HEADS, 1, HEAD_SIZE, generator=generator)
    key, value = torch.randn(2, rows, KV_HEADS, width, HEAD_SIZE, generator=generator)
    mask = torch.zeros(rows, 1, 1, width, dtype=torch.bool)
    for row, count in enumerate(num_tokens):
        mask[row, ..., width - count :] = True
    return query, key, value, mask


@pytest.mark.parametrize("num_tokens", [[5], [40, 3], list(range(40, 0, -1)), [7] * 33])
def test_groups_hold_every_row_once_and_all_its_tokens(num_tokens: list[int]) -> None:
    seen: list[int] = []
    for rows, width in group_rows(num_tokens):
        members = num_tokens[rows]
        assert width == max(members)
        seen += members
    assert seen == num_tokens


def test_young_rows_are_not_read_as_wide_as_old_ones() -> None:
    num_tokens = [100] * 16 + [10] * 16
    read = sum(len(num_tokens[rows]) * width for rows, width in group_rows(num_tokens))
    assert read == sum(num_tokens)


@pytest.mark.parametrize("num_tokens", [[9], list(range(50, 10, -1)), [3, 30] * 20])
def test_grouped_attention_is_attention(num_tokens: list[int]) -> None:
    query, key, value, mask = inputs(num_tokens)
    plain, _ = grouped_attention(Layer(), query, key, value, mask, scaling=0.3)
    grouped, _ = grouped_attention(
        Layer(), query, key, value, mask, scaling=0.3, row_groups=group_rows(num_tokens)
    )
    torch.testing.assert_close(grouped, plain)


def test_without_padding_there_is_no_mask() -> None:
    query, key, value, _ = inputs([12] * 9)
    plain, _ = grouped_attention(Layer(), query, key, value, None, scaling=0.3)
    grouped, _ = grouped_attention(
        Layer(), query, key, value, None, scaling=0.3, row_groups=group_rows([12] * 9)
    )
    torch.testing.assert_close(grouped, plain)


@pytest.mark.parametrize("kind", ["bool", "added", "none"])
@pytest.mark.parametrize("scaling", [0.3, None])
def test_products_are_attention(kind: str, scaling: float | None) -> None:
    _, key, value, is_read = inputs([3, 30] * 5)
    query = torch.randn(
        len(key), KV_HEADS, 3, HEAD_SIZE, generator=torch.Generator().manual_seed(1)
    )
    added = torch.zeros(is_read.shape).masked_fill(~is_read, -torch.inf)
    mask = {"bool": is_read, "added": added, "none": None}[kind]
    expected = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling
    )
    torch.testing.assert_close(attention_by_products(query, key, value, mask, scaling), expected)
