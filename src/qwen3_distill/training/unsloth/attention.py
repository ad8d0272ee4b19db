"""Shared prompts in unsloth's own attention, in layers that stay compiled.

Shape letters: T places of the row, H heads, D dimensions of a head.
"""

import importlib
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from qwen3_distill.training.flash_rows import FlashRow
from qwen3_distill.training.prompt_attention import PromptAttention

_ATTENTION, _LENGTHS = "prefix_seg_info", "packed_seq_lengths"
_PATCHED = "_qwen3_distill_attends"


class _Running:
    """Holds what the layer that runs now attends as.

    Not an argument of the layer: unsloth compiles a layer as one region, but not for a call with
    such an argument, and a region would be compiled anew for every attention that it is given.
    """

    def __init__(self) -> None:
        self.attention: PromptAttention | None = None
        self.row: FlashRow | None = None
        """The same in one launch; None: the kernel is not for this device, dtype or size."""


# An object: PyTorch 2.11 takes None in a class's attribute for a constant, and looks there once.
_RUNNING = _Running()


def arguments_with(attention: PromptAttention, num_tokens: int) -> dict[str, Any]:
    """Return the arguments of a model's forward pass over one row with which it attends so.

    With the first, which unsloth hands down to every layer, the model neither cuts a row at its
    length nor makes a mask. Without the second it would look in the positions for where sequences
    begin, and wait for the device.
    """
    lengths = torch.tensor([num_tokens], dtype=torch.int32)
    return {_ATTENTION: attention, _LENGTHS: lengths}


def patch_attention(layers: Iterable[nn.Module]) -> None:
    """Have these layers of Qwen3 attend as the `PromptAttention` that a forward pass is given."""
    qwen3: Any = importlib.import_module("unsloth.models.qwen3")  # needs triton, so not on a CPU
    if not hasattr(qwen3.run_attention, _PATCHED):
        qwen3.run_attention = attention_of_running(qwen3.run_attention)
    hand_over(layers)


def attention_of_running(otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return unsloth's `run_attention` with ours in layers that were given one.

    A compiled region has it inside where one launch computes it. Else the region ends before it
    and begins again behind it: its shapes differ with every micro-batch.
    """

    def run_attention(*, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """Return [1, T, H, D] of queries [1, H, T, D], and keys and values likewise."""
        if _RUNNING.attention is None:
            return otherwise(config=config, context=context, Q=Q, K=K, V=V)
        row, given = _RUNNING.row, (Q.squeeze(0), K.squeeze(0), V.squeeze(0))
        if row is None:
            out_HTD = _beside(*given)
        else:
            out_HTD = row.attend(*given, scale=Q.shape[-1] ** -0.5)
        return out_HTD.transpose(0, 1).unsqueeze(0)

    setattr(run_attention, _PATCHED, True)
    return run_attention


# A function of its own: one that the compiler is kept out of divides the region that calls it.
def _attend(query_HTD: Tensor, key_GTD: Tensor, value_GTD: Tensor) -> Tensor:
    assert _RUNNING.attention is not None
    return _RUNNING.attention(query_HTD, key_GTD, value_GTD)


_beside: Any = torch.compiler.disable(_attend)


def hand_over(layers: Iterable[nn.Module]) -> None:
    """Have each layer keep what `arguments_with` gave from its class's forward pass.

    Not the class: unsloth gives it another forward pass with every model that it loads.
    """
    for layer in layers:
        layer.forward = MethodType(_handing_over, layer)


def _handing_over(self: Any, hidden_1TD: Tensor, *arguments: Any, **options: Any) -> Any:
    before = _RUNNING.attention, _RUNNING.row
    attention = options.get(_ATTENTION)
    if isinstance(attention, PromptAttention):
        options = {
            name: value for name, value in options.items() if name not in (_ATTENTION, _LENGTHS)
        }
        _RUNNING.attention = attention
        _RUNNING.row = attention.one_launch(hidden_1TD.dtype, self.self_attn.head_dim)
    else:
        _RUNNING.attention = _RUNNING.row = None
    try:
        return type(self).forward(self, hidden_1TD, *arguments, **options)
    finally:
        _RUNNING.attention, _RUNNING.row = before
