"""How much memory a training step takes, and how many layers to recompute so that it fits.

Gradient checkpointing trades memory for a second forward pass. The choice is made per layer: a
layer either keeps its activations or is recomputed in the backward pass. The *first* layers are the
ones to recompute: the backward pass reaches them last, when the activations that later layers kept
are free again.

The planner (`planning.memory`) sizes the learner with this model and all other pieces itself; it is
here because the learner, which is below the planner, decides with it.

No torch here, only arithmetic. The coefficients of plain PyTorch are what its saved-tensor hooks
count; those of unsloth's fused kernels follow from what the kernels keep, and agree with peaks
measured on one H200 within 3% (tests/unit/modeling/test_step_memory.py).
"""

from dataclasses import dataclass
from typing import Literal

from qwen3_distill.config import EmbeddedTraining, LoraTuning, TuningConfig, UnslothTraining
from qwen3_distill.modeling.shapes import ModelShape

GIB = 1 << 30
_CONTEXT_BYTES = 3 * GIB // 4

Arithmetic = Literal["fused", "float32", "bfloat16"]
"""``fused``: unsloth's bfloat16 LoRA kernels. Else plain PyTorch in this dtype."""


def arithmetic_of(training: EmbeddedTraining | UnslothTraining, *, on_gpu: bool) -> Arithmetic:
    """How a learner computes on a device."""
    fused = training.kind == "unsloth" and training.tuning.kind == "lora"
    if on_gpu and fused and training.dtype == "bfloat16":
        return "fused"
    if training.dtype == "bfloat16" or autocasts(training, on_gpu=on_gpu):
        return "bfloat16"
    return "float32"


def autocasts(training: EmbeddedTraining | UnslothTraining, *, on_gpu: bool) -> bool:
    """Whether a learner computes in bfloat16 whatever its weights are."""
    if training.autocast != "auto":
        return training.autocast == "bfloat16"
    return on_gpu and (training.kind == "embedded" or training.tuning.kind == "full")


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
_FUSED_LOGIT_ROWS = 512
"""Rows of float32 logits that exist at a time in unsloth's pass."""
_LOGIT_COPIES = 3
"""Logits, their log-softmax and its gradient, of ``chunk_tokens`` rows elsewhere."""
_ADAM_BYTES = 16
"""An adapter's weight in float32, its gradient, two moments."""
_FULL_COPIES = 4
"""The same of a model's own weights, in their dtype."""


def activation_bytes(shape: ModelShape, tuning: TuningConfig, arithmetic: Arithmetic) -> int:
    """Bytes that one layer keeps for the backward pass, per token."""
    kept = _KEPT[arithmetic, tuning.kind]
    return (
        kept.hidden * shape.hidden_size
        + kept.intermediate * shape.intermediate_size
        + kept.query * shape.query_size
        + kept.key * shape.key_size
    )


def weight_bytes(
    shape: ModelShape, tuning: TuningConfig, *, base_bytes: int, arithmetic: Arithmetic
) -> int:
    """Bytes that do not depend on the batch: weights, gradients, moments.

    Args:
        base_bytes: bytes of one weight of the model.
    """
    if isinstance(tuning, LoraTuning):
        adapters = _ADAM_BYTES * shape.lora_parameters(tuning.rank, tuning.target_modules)
        return shape.weight_bytes(base_bytes) + adapters
    # Autocast keeps a bfloat16 copy of every matrix from its first use to the backward pass.
    copies = 2 if arithmetic == "bfloat16" and base_bytes == 4 else 0
    return shape.weight_bytes(_FULL_COPIES * base_bytes + copies)


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Which layers are recomputed."""

    recomputed_layers: int
    """The first so many."""
    offload: bool
    """Their inputs wait in host memory."""

    def describe(self, shape: ModelShape) -> str:
        """For people: ``4 of 36 layers recomputed``."""
        where = ", their inputs kept in host memory" if self.offload else ""
        return f"{self.recomputed_layers} of {shape.num_layers} layers recomputed{where}"


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Predicts the peak of a training step."""

    shape: ModelShape
    tuning: TuningConfig
    arithmetic: Arithmetic
    base_bytes: int
    """Of one weight of the base model."""
    logit_rows: int = _FUSED_LOGIT_ROWS
    """Rows of float32 logits, or of what is as large, that exist at a time."""
    merged_bytes: int = 0
    """The layers with their adapters merged in, kept for an engine that takes them so."""

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        training: EmbeddedTraining | UnslothTraining,
        *,
        on_gpu: bool,
        merges: bool,
    ) -> "MemoryModel":
        """A learner's.

        Args:
            merges: an engine takes the layers with their adapters merged in.
        """
        base_bytes = 4 if training.dtype == "float32" else 2
        merged = 0
        if merges and isinstance(training.tuning, LoraTuning):
            merged = base_bytes * shape.merged_parameters(training.tuning.target_modules)
        arithmetic = arithmetic_of(training, on_gpu=on_gpu)
        return cls(
            shape=shape,
            tuning=training.tuning,
            arithmetic=arithmetic,
            base_bytes=base_bytes,
            logit_rows=(
                _FUSED_LOGIT_ROWS
                if arithmetic == "fused"
                else _LOGIT_COPIES * training.chunk_tokens
            ),
            merged_bytes=merged,
        )

    @property
    def fixed_bytes(self) -> int:
        """What is there before, in and after every step."""
        weights = weight_bytes(
            self.shape, self.tuning, base_bytes=self.base_bytes, arithmetic=self.arithmetic
        )
        return weights + self.merged_bytes

    def peak_bytes(self, tokens: int, choice: Checkpointing) -> int:
        """Peak of a step whose largest micro-batch holds ``tokens`` tokens."""
        return self.fixed_bytes + self.step_bytes(tokens, choice)

    def step_bytes(self, tokens: int, choice: Checkpointing) -> int:
        """What a step adds at its peak.

        That is at one of two places: at the loss, when all is kept that will be kept, or where the
        first recomputed layer runs again beside its own backward pass.
        """
        shape, width = self.shape, _WIDTH[self.arithmetic]
        layer = activation_bytes(shape, self.tuning, self.arithmetic)
        inputs = 0 if choice.offload else choice.recomputed_layers * width * shape.hidden_size
        kept = (shape.num_layers - choice.recomputed_layers) * layer
        logits = min(self.logit_rows, _LOGIT_COPIES * tokens) * shape.vocab_size * 4
        at_loss = tokens * (kept + inputs)
        at_loss += max(logits, tokens * _TAIL_WIDTHS * width * shape.hidden_size)
        at_recomputation = tokens * (inputs + 2 * layer) if choice.recomputed_layers else 0
        return max(at_loss, at_recomputation)

    def fewest_recomputed(
        self, tokens: int, budget_bytes: int, *, may_offload: bool
    ) -> Checkpointing:
        """The cheapest choice whose peak fits; the thriftiest one where none does.

        Args:
            may_offload: whether host memory is other memory than the device's.
        """
        counts = range(self.shape.num_layers + 1)
        ladder = [Checkpointing(recomputed_layers=k, offload=False) for k in counts]
        if may_offload:
            ladder += [Checkpointing(recomputed_layers=k, offload=True) for k in counts[1:]]
        for choice in ladder:
            if self.peak_bytes(tokens, choice) <= budget_bytes:
                return choice
        # Not the last: with all but one recomputed, the one that runs again makes the peak.
        return min(ladder, key=lambda choice: self.peak_bytes(tokens, choice))


def allocator_bytes(memory_bytes: int) -> int:
    """What PyTorch may take of a process's share of the device: the rest is the CUDA context."""
    return max(memory_bytes - _CONTEXT_BYTES, 1)


def usable_bytes(memory_bytes: int) -> int:
    """What tensors may take of a process's share of the device.

    The rest is the CUDA context and what the allocator cannot use of its blocks.
    """
    return int(memory_bytes * 0.95) - _CONTEXT_BYTES
