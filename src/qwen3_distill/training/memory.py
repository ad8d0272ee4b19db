"""How much memory a training step takes, and how many layers to recompute so that it fits.

Gradient checkpointing trades memory for a second forward pass. The choice is made per layer: a
layer either keeps its activations or is recomputed in the backward pass. The *first* layers are the
ones to recompute: the backward pass reaches them last, when the activations that later layers kept
are free again.

No torch here, only arithmetic. The coefficients of plain PyTorch are what its saved-tensor hooks
count; those of unsloth's fused kernels follow from what the kernels keep, and agree with peaks
measured on one H200 within 3% (tests/unit/training/test_memory.py).
"""

from dataclasses import dataclass
from typing import Literal

from qwen3_distill.config import LoraTuning, TuningConfig

GIB = 1 << 30

Arithmetic = Literal["fused", "float32", "bfloat16"]
"""``fused``: unsloth's bfloat16 LoRA kernels. Else plain PyTorch in this dtype."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a Qwen3 model's memory follows from."""

    hidden: int
    intermediate: int
    layers: int
    query: int
    """Heads times their size."""
    key: int
    """Key-value heads times their size."""
    vocabulary: int
    tied: bool
    """Whether the output head is the embedding."""

    @property
    def parameters(self) -> int:
        """Norms left out."""
        block = self.hidden * (2 * self.query + 2 * self.key + 3 * self.intermediate)
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * block + embeddings

    def adapter_parameters(self, tuning: LoraTuning) -> int:
        """Of LoRA: rank times inputs plus outputs, of every adapted linear layer."""
        sizes = {
            "q_proj": self.hidden + self.query,
            "k_proj": self.hidden + self.key,
            "v_proj": self.hidden + self.key,
            "o_proj": self.query + self.hidden,
            "gate_proj": self.hidden + self.intermediate,
            "up_proj": self.hidden + self.intermediate,
            "down_proj": self.intermediate + self.hidden,
        }
        return self.layers * tuning.rank * sum(sizes[name] for name in tuning.target_modules)


@dataclass(frozen=True)
class _Kept:
    """Bytes that one layer keeps per token, by unit of width."""

    hidden: int
    intermediate: int
    query: int
    key: int


_FUSED = _Kept(8, 4, 10, 2)
_KEPT: dict[tuple[Arithmetic, str], _Kept] = {
    # Two residuals and two norms; gate and up; queries before and after their norm and rotation,
    # keys and values repeated for every query head, attention's output.
    ("fused", "lora"): _FUSED,
    ("fused", "full"): _FUSED,
    ("float32", "lora"): _Kept(16, 16, 12, 12),
    ("float32", "full"): _Kept(24, 16, 16, 16),
    ("bfloat16", "lora"): _Kept(28, 10, 12, 8),
    ("bfloat16", "full"): _Kept(28, 14, 14, 14),  # of float32 weights, under autocast
}
_WIDTH: dict[Arithmetic, int] = {"fused": 2, "float32": 4, "bfloat16": 2}
_TAIL_WIDTHS = 12
"""Hidden vectors a token that live beside the layers' activations where the loss is computed."""
_HEAD_ROWS = 512
"""Rows of float32 logits that exist at a time."""
_ADAM_BYTES = 16
"""A trained weight in float32, its gradient, two moments."""


def activation_bytes(shape: ModelShape, tuning: TuningConfig, arithmetic: Arithmetic) -> int:
    """Bytes that one layer keeps for the backward pass, per token."""
    kept = _KEPT[arithmetic, tuning.kind]
    return (
        kept.hidden * shape.hidden
        + kept.intermediate * shape.intermediate
        + kept.query * shape.query
        + kept.key * shape.key
    )


def weight_bytes(
    shape: ModelShape, tuning: TuningConfig, *, base_bytes: int, arithmetic: Arithmetic
) -> int:
    """Bytes that do not depend on the batch: weights, gradients, moments.

    Args:
        base_bytes: bytes of one weight of the base model.
    """
    if isinstance(tuning, LoraTuning):
        adapters = _ADAM_BYTES * shape.adapter_parameters(tuning)
        return base_bytes * shape.parameters + adapters
    # Autocast keeps a bfloat16 copy of every matrix from its first use to the backward pass.
    copies = 2 if arithmetic == "bfloat16" else 0
    return (_ADAM_BYTES + copies) * shape.parameters


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Which layers are recomputed."""

    recomputed_layers: int
    """The first so many."""
    offload: bool
    """Their inputs wait in host memory."""


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Predicts the peak of a training step."""

    shape: ModelShape
    tuning: TuningConfig
    arithmetic: Arithmetic
    base_bytes: int
    """Of one weight of the base model."""

    def peak_bytes(self, tokens: int, choice: Checkpointing) -> int:
        """Peak of a step whose largest micro-batch holds ``tokens`` tokens.

        It stands at one of two places: at the loss, when all is kept that will be kept, or where
        the first recomputed layer runs again beside its own backward pass.
        """
        shape, width = self.shape, _WIDTH[self.arithmetic]
        layer = activation_bytes(shape, self.tuning, self.arithmetic)
        inputs = 0 if choice.offload else choice.recomputed_layers * width * shape.hidden
        kept = (shape.layers - choice.recomputed_layers) * layer
        logits = min(_HEAD_ROWS, tokens) * shape.vocabulary * 4
        at_loss = tokens * (kept + inputs)
        at_loss += max(logits, tokens * _TAIL_WIDTHS * width * shape.hidden)
        at_recomputation = tokens * (inputs + 2 * layer) if choice.recomputed_layers else 0
        fixed = weight_bytes(
            shape, self.tuning, base_bytes=self.base_bytes, arithmetic=self.arithmetic
        )
        return fixed + max(at_loss, at_recomputation)

    def fewest_recomputed(
        self, tokens: int, budget_bytes: int, *, may_offload: bool
    ) -> Checkpointing:
        """The cheapest choice whose peak fits; the thriftiest one where none does.

        Args:
            may_offload: whether host memory is other memory than the device's.
        """
        counts = range(self.shape.layers + 1)
        ladder = [Checkpointing(recomputed_layers=k, offload=False) for k in counts]
        if may_offload:
            ladder += [Checkpointing(recomputed_layers=k, offload=True) for k in counts[1:]]
        for choice in ladder:
            if self.peak_bytes(tokens, choice) <= budget_bytes:
                return choice
        # Not the last: with all but one recomputed, the one that runs again makes the peak.
        return min(ladder, key=lambda choice: self.peak_bytes(tokens, choice))


def usable_bytes(memory_bytes: int) -> int:
    """What tensors may take of a process's share of the device.

    The rest is the CUDA context and what the allocator cannot use of its blocks.
    """
    return int(memory_bytes * 0.95) - 3 * GIB // 4
