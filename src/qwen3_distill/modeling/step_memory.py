"""Predicts the memory of a training step, and how many layers to recompute so that it fits.

Gradient checkpointing trades memory for a second forward pass. The choice is made per layer: a
layer either keeps its activations or is recomputed in the backward pass. The *first* layers are
recomputed: the backward pass reaches them last, when the activations that later layers kept are
free again.

No torch here, only arithmetic. The learner's half of the memory plan is below `training/`, which
needs it; the other processes' shares are in `planning/memory.py`. The coefficients of plain PyTorch
are counted by its saved-tensor hooks. Those of unsloth's fused kernels follow from what the kernels
keep, and agree with peaks measured on one H200 within 3%
(tests/unit/modeling/test_step_memory.py).
"""

from dataclasses import dataclass
from typing import Literal

from qwen3_distill.config import EmbeddedTraining, LoraTuning, TuningConfig, UnslothTraining
from qwen3_distill.modeling.shapes import ModelShape

GIB = 1 << 30
_CONTEXT_BYTES = 3 * GIB // 4

Arithmetic = Literal["fused", "float32", "bfloat16"]
"""``fused``: unsloth's bfloat16 LoRA kernels; otherwise plain PyTorch in this dtype."""


def arithmetic_of(training: EmbeddedTraining | UnslothTraining, *, on_gpu: bool) -> Arithmetic:
    """Return the kernels and dtype that a learner computes with."""
    fused = training.kind == "unsloth" and training.tuning.kind == "lora"
    if on_gpu and fused and training.dtype == "bfloat16":
        return "fused"
    if training.dtype == "bfloat16" or autocasts(training, on_gpu=on_gpu):
        return "bfloat16"
    return "float32"


def autocasts(training: EmbeddedTraining | UnslothTraining, *, on_gpu: bool) -> bool:
    """Whether a learner computes in bfloat16 whatever the dtype of its weights."""
    if training.autocast != "auto":
        return training.autocast == "bfloat16"
    return on_gpu and (training.kind == "embedded" or training.tuning.kind == "full")


@dataclass(frozen=True)
class _Kept:
    """Bytes that one layer keeps per token and per unit of each width."""

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
"""Hidden vectors per token that exist in addition to the layers' activations at the loss."""
_FUSED_LOGIT_ROWS = 512
"""Rows of float32 logits that exist at a time in unsloth's pass through the head."""
_LOGIT_COPIES = 3
"""Logits, their log-softmax and its gradient, each of ``chunk_tokens`` rows, in plain PyTorch."""
_ADAM_BYTES = 16
"""Bytes of an adapter's parameter: weight, gradient and two moments in float32."""
_FULL_COPIES = 4
"""Copies that full tuning keeps of a parameter, in its dtype: weight, gradient, two moments."""
_GATHERED_LAYERS = 4
"""Layers' matrices, in the dtype of the computation, that exist at a time where ranks divide them:
the one that computes, the one that is gathered meanwhile and its buffer, and a gradient."""
_SUMMED_LAYERS = 2
"""Layers' gradients, in the dtype of the weights, that are being summed over the ranks."""
_LOST_SHARE = 0.2
"""Bytes that PyTorch holds and cannot use, for each byte that a step takes and gives back. Where
segments do not grow it was 0.4, and a step without that room failed (docs/engines/memory.md)."""


def activation_bytes(shape: ModelShape, tuning: TuningConfig, arithmetic: Arithmetic) -> int:
    """Bytes per token that one layer keeps for the backward pass."""
    kept = _KEPT[arithmetic, tuning.kind]
    return (
        kept.hidden * shape.hidden_size
        + kept.intermediate * shape.intermediate_size
        + kept.query * shape.query_size
        + kept.key * shape.key_size
    )


def weight_bytes(
    shape: ModelShape,
    tuning: TuningConfig,
    *,
    base_bytes: int,
    arithmetic: Arithmetic,
    shards: int = 1,
) -> int:
    """Bytes of weights, gradients and moments, which do not depend on the batch.

    Args:
        base_bytes: bytes of one weight of the model.
        shards: ranks over which full tuning divides the layers' matrices.
    """
    if isinstance(tuning, LoraTuning):
        adapters = _ADAM_BYTES * shape.lora_parameters(tuning.rank, tuning.target_modules)
        return shape.weight_bytes(base_bytes) + adapters
    # Autocast keeps a bfloat16 copy of every matrix from its first use to the backward pass.
    copies = 2 if arithmetic == "bfloat16" and base_bytes == 4 else 0
    if shards == 1:
        return shape.weight_bytes(_FULL_COPIES * base_bytes + copies)
    whole = (_FULL_COPIES * base_bytes + copies) * (shape.num_parameters - shape.linear_parameters)
    return whole + _FULL_COPIES * base_bytes * -(-shape.linear_parameters // shards)


def _rounded_bytes(
    shape: ModelShape, training: EmbeddedTraining | UnslothTraining, base_bytes: int
) -> int:
    """Bytes that frozen layers in float8 take, less those of the weights that they replace."""
    if training.base_precision == "as_loaded" or not isinstance(training.tuning, LoraTuning):
        return 0
    weights = shape.merged_parameters(training.tuning.target_modules)
    # Transposed, beside the weights; or both ways, in their place.
    return weights if training.base_precision == "fp8_backward" else weights * (2 - base_bytes)


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """A choice of layers to recompute in the backward pass."""

    recomputed_layers: int
    """Number of layers, counted from the first."""
    offload: bool
    """Whether their inputs are kept in host memory."""

    def describe(self, shape: ModelShape) -> str:
        """Text for people: ``4 of 36 layers recomputed``."""
        where = ", their inputs kept in host memory" if self.offload else ""
        return f"{self.recomputed_layers} of {shape.num_layers} layers recomputed{where}"


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Predicts the peak of a training step."""

    shape: ModelShape
    tuning: TuningConfig
    arithmetic: Arithmetic
    base_bytes: int
    """Bytes of one weight of the base model."""
    logit_rows: int = _FUSED_LOGIT_ROWS
    """Rows of float32 logits, or of tensors of their size, that exist at a time."""
    merged_bytes: int = 0
    """Bytes of layers with merged adapters, kept for an engine that takes merged weights."""
    rounded_bytes: int = 0
    """Bytes of frozen layers in float8, less those of the weights that they replace."""
    shards: int = 1
    """Ranks over which the layers' matrices are divided."""
    lost_share: float = _LOST_SHARE
    """Bytes that are held and cannot be used, for each byte that a step adds."""

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        training: EmbeddedTraining | UnslothTraining,
        *,
        on_gpu: bool,
        merges: bool,
        shards: int = 1,
    ) -> "MemoryModel":
        """The model of a learner's memory.

        Args:
            merges: whether an engine takes merged weights.
            shards: ranks over which the layers' matrices are divided.
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
            rounded_bytes=_rounded_bytes(shape, training, base_bytes),
            shards=shards,
            lost_share=_LOST_SHARE if on_gpu else 0.0,
        )

    @property
    def fixed_bytes(self) -> int:
        """Bytes that are allocated before, during and after every step."""
        weights = weight_bytes(
            self.shape,
            self.tuning,
            base_bytes=self.base_bytes,
            arithmetic=self.arithmetic,
            shards=self.shards,
        )
        return weights + self.rounded_bytes + self.merged_bytes + self.gathered_bytes

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the layers that are gathered, and whose gradients are summed, in a step."""
        if self.shards == 1:
            return 0
        layer = self.shape.linear_parameters // self.shape.num_layers
        computed = _GATHERED_LAYERS * min(self.base_bytes, _WIDTH[self.arithmetic])
        return layer * (computed + _SUMMED_LAYERS * self.base_bytes)

    def peak_bytes(self, tokens: int, choice: Checkpointing) -> int:
        """Peak bytes of a step whose largest micro-batch holds ``tokens`` tokens."""
        return self.fixed_bytes + self.step_bytes(tokens, choice)

    def held_bytes(self, tokens: int, choice: Checkpointing) -> int:
        """Most bytes that the allocator holds, with those that it cannot use.

        That is in a step, or after it, when the next version's merged weights are made beside those
        of the last, which an engine may be reading.
        """
        step = self.step_bytes(tokens, choice) + self.lost_bytes(tokens, choice)
        return self.fixed_bytes + max(step, self.merged_bytes)

    def lost_bytes(self, tokens: int, choice: Checkpointing) -> int:
        """Bytes that the allocator holds in a step and cannot use: rests between tensors."""
        return int(self.lost_share * self.step_bytes(tokens, choice))

    def step_bytes(self, tokens: int, choice: Checkpointing) -> int:
        """Bytes that a step adds at its peak.

        The peak is at one of two places: at the loss, when every layer has kept its activations, or
        where the first recomputed layer runs again during its own backward pass.
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
        """Return the fastest choice that fits, or the one of least memory if none does.

        Args:
            budget_bytes: the most that the allocator may hold.
            may_offload: whether host memory is separate from the device's.
        """
        counts = range(self.shape.num_layers + 1)
        ladder = [Checkpointing(recomputed_layers=k, offload=False) for k in counts]
        if may_offload:
            ladder += [Checkpointing(recomputed_layers=k, offload=True) for k in counts[1:]]
        for choice in ladder:
            if self.held_bytes(tokens, choice) <= budget_bytes:
                return choice
        # Not the last: with all but one recomputed, the one that runs again makes the peak.
        return min(ladder, key=lambda choice: self.peak_bytes(tokens, choice))


def allocator_bytes(memory_bytes: int) -> int:
    """Bytes of a process's share of the device for PyTorch; the rest is the CUDA context."""
    return max(memory_bytes - _CONTEXT_BYTES, 1)
