"""Probing packed sequences, and recomputing layers, in a model that any library prepared."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwen3_distill.errors import EngineStartError

_PROBE_LENGTHS = (19, 7, 12)

PackedForward: TypeAlias = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""From input ids [1, T], positions [1, T] and the lengths of the sequences to [1, T, D]."""


def recompute_first_layers(core: PreTrainedModel, count: int) -> None:
    """Let only the first layers recompute in the backward pass.

    Raises:
        EngineStartError: checkpointing was not enabled on the model before.
    """
    for index, layer in enumerate(core.model.layers):
        if index >= count:
            layer.gradient_checkpointing = False
        elif not layer.gradient_checkpointing:
            raise EngineStartError(
                f"layer {index} cannot be recomputed: checkpointing was not enabled when the model "
                "was loaded; set training.gradient_checkpointing=off"
            )


@torch.no_grad()
def packing_gap(core: PreTrainedModel, packed_forward: PackedForward) -> float:
    """Largest difference of hidden states between packed and single sequences, over the largest.

    Rounding gives 1e-6 in float32. Sequences that see one another give about 1.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = core.config.vocab_size
    rows = [torch.randint(vocabulary, (1, n), generator=generator) for n in _PROBE_LENGTHS]
    positions = torch.cat([torch.arange(n) for n in _PROBE_LENGTHS]).unsqueeze(0)
    device = core.device
    was_training = core.training
    core.eval()  # dropout would differ
    try:
        packed = torch.cat(rows, dim=1).to(device)
        together_1TD = packed_forward(packed, positions.to(device), _PROBE_LENGTHS)
        alone = [core.model(input_ids=row.to(device), use_cache=False)[0] for row in rows]
    finally:
        core.train(was_training)
    expected_1TD = torch.cat(alone, dim=1).float()
    gap = (together_1TD.float() - expected_1TD).abs().max()
    return float(gap / expected_1TD.abs().max())
