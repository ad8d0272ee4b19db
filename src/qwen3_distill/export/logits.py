"""Logits of two forms of one model, compared on the same tokens."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_ROWS = 2
_POSITIONS = 128


def probe_ids(config: Any) -> Tensor:
    """[2, T] int64: the same random ids for one vocabulary, T at most 128 and the context."""
    generator = torch.Generator().manual_seed(0)
    length = min(_POSITIONS, config.max_position_embeddings)
    return torch.randint(0, config.vocab_size, (_ROWS, length), generator=generator)


@torch.no_grad()
def probe_logits(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """[B, T, V] float32."""
    found: Any = model(input_ids=ids_BT.to(model.device), use_cache=False)
    return found.logits.float().cpu()


def largest_difference(left: Tensor, right: Tensor) -> float:
    """The largest absolute difference; NaN where either has one."""
    return float((left - right).abs().max())


def same_top_fraction(left: Tensor, right: Tensor) -> float:
    """Share of positions where both put the same token first."""
    return float((left.argmax(-1) == right.argmax(-1)).float().mean())
