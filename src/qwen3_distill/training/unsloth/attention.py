"""Shared prompts in unsloth's own attention. Imported in the worker's process only."""

import importlib
from typing import Any

from torch import Tensor

from qwen3_distill.training.prompt_attention import PromptAttention

ATTENTION_ARGUMENT = "prefix_seg_info"
"""The argument of the model's forward pass that unsloth hands down to every layer's attention, and
with which it neither cuts a row at the model's length nor makes a mask."""


def patch_attention() -> None:
    """Have unsloth's Qwen3 attend as the `PromptAttention` says that a forward pass is given."""
    qwen3: Any = importlib.import_module("unsloth.models.qwen3")  # needs triton, so not on a CPU
    of_unsloth = qwen3.run_attention

    def run_attention(*, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """Return [1, T, H, D] of queries [1, H, T, D], and keys and values likewise."""
        attention = context.prefix_seg_info
        if not isinstance(attention, PromptAttention):
            return of_unsloth(config=config, context=context, Q=Q, K=K, V=V)
        out_HTD = attention(Q.squeeze(0), K.squeeze(0), V.squeeze(0))
        return out_HTD.transpose(0, 1).unsqueeze(0)

    qwen3.run_attention = run_attention
