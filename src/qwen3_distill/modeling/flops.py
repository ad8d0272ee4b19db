"""Counts the floating-point operations of a Qwen3 model from its shape. No torch.

Counted are matrix products, an addition and a multiplication each, as in Kaplan et al. 2020
(arXiv 2001.08361, table 1): 2 per parameter of a linear layer and token forward, plus attention's
two products of 2 * heads * head size per pair of a query and a key that it sees. Norms, rotations,
softmax, sampling and the optimizer are left out: together well below 1%. The formulas with their
reasons: docs/concepts/cost.md.

All results are integers, so that sums over a run are exact.
"""

from collections.abc import Collection
from dataclasses import dataclass

from qwen3_distill.config import (
    FullBaseline,
    FullDivergence,
    LoraTuning,
    ObjectiveConfig,
    SampledReverseKL,
    TopKBaseline,
    TuningConfig,
)
from qwen3_distill.modeling.shapes import ModelShape


def causal_pairs(num_tokens: int, *, cached: int = 0) -> int:
    """Count the pairs of a new token and a token that it attends to, itself included.

    Args:
        num_tokens: new tokens.
        cached: tokens before them, whose keys and values are there.
    """
    return num_tokens * cached + num_tokens * (num_tokens + 1) // 2


def forward_flops(shape: ModelShape, *, tokens: int, pairs: int, head_tokens: int) -> int:
    """Count a forward pass: prefill, scoring, or the decode steps of a response.

    Args:
        tokens: tokens that pass through the blocks.
        pairs: `causal_pairs` of every sequence, added up.
        head_tokens: tokens to which the output head is applied.
    """
    blocks = 2 * shape.linear_parameters * tokens + _attention(shape, pairs)
    return blocks + head_flops(shape, head_tokens)


def sampling_flops(shape: ModelShape, *, prompt: int, response: int, prefills: bool) -> int:
    """Count the sampling of one response with a KV cache.

    The prompt's pass gives the first token, and the last token enters no pass.

    Args:
        prefills: whether the prompt is computed; False where another sample of it was before.
    """
    steps = response - 1
    tokens, pairs = steps, causal_pairs(steps, cached=prompt)
    if prefills:
        tokens, pairs = tokens + prompt, pairs + causal_pairs(prompt)
    return forward_flops(shape, tokens=tokens, pairs=pairs, head_tokens=response)


def head_flops(shape: ModelShape, tokens: int) -> int:
    """Count one application of the output head."""
    return 2 * shape.vocab_size * shape.hidden_size * tokens


@dataclass(frozen=True, kw_only=True)
class TrainedTokens:
    """Counts of a step's forward and backward passes, made by the learner."""

    tokens: int
    """Input tokens of the sequences, or of their padding."""
    pairs: int
    """`causal_pairs` of every sequence, added up."""
    loss_tokens: int
    """Tokens to which the output head is applied."""
    recomputed_loss_tokens: int
    """Loss tokens of micro-batches whose logits are computed twice, because there are more than
    ``training.chunk_tokens`` of them."""
    recomputed_layers: int
    """Blocks that the backward pass computes again (gradient checkpointing)."""


def training_flops(shape: ModelShape, tuning: TuningConfig, work: TrainedTokens) -> int:
    """Count the forward and backward passes of the student in an optimizer step.

    With all weights trained, the backward pass costs twice the forward pass: one product for the
    gradient of a layer's input, one for that of its weights. With LoRA the frozen weights have no
    gradient, and the adapters cost three products each. Two products are computed by nobody and
    left out: the gradient of the first block's input where the embedding is frozen, and the last
    product of a block that is computed again.
    """
    adapter = tuning if isinstance(tuning, LoraTuning) else None
    forward = _block_flops(shape, adapter)
    twice = work.recomputed_layers * (forward - _last_product_flops(shape, adapter))
    per_token = shape.num_layers * forward + twice
    if adapter is None:
        per_token += 2 * shape.num_layers * forward
    else:
        lora = 2 * shape.lora_parameters(adapter.rank, adapter.target_modules)
        per_token += 2 * shape.linear_parameters + 2 * lora
        if not work.recomputed_layers:  # a block that is recomputed has an input with a gradient
            per_token -= _first_input_flops(shape, adapter)
    layers = 3 * shape.num_layers + work.recomputed_layers
    attention = _attention(shape, work.pairs) // shape.num_layers * layers
    passes = 2 if adapter is not None else 3
    head = head_flops(shape, passes * work.loss_tokens + work.recomputed_loss_tokens)
    return per_token * work.tokens + attention + head


def objective_flops(
    student: ModelShape, teacher: ModelShape | None, objective: ObjectiveConfig, work: TrainedTokens
) -> int:
    """Count the passes through an output head that an objective makes besides the student's own.

    The full divergence computes the teacher's logits from its hidden states, again where logits are
    recomputed; a baseline computes its logits without a gradient.
    """
    count = 0
    if isinstance(objective, SampledReverseKL):
        baseline = objective.kl_baseline
        if isinstance(baseline, TopKBaseline | FullBaseline):
            count += head_flops(student, work.loss_tokens)
        if isinstance(baseline, FullBaseline) and teacher is not None:
            count += head_flops(teacher, work.loss_tokens)
    elif isinstance(objective, FullDivergence) and teacher is not None:
        count += head_flops(teacher, work.loss_tokens + work.recomputed_loss_tokens)
    return count


def _attention(shape: ModelShape, pairs: int) -> int:
    """Count both products of all layers: queries with keys, weights with values."""
    return 4 * shape.num_layers * shape.query_size * pairs


def _block_flops(shape: ModelShape, adapter: LoraTuning | None) -> int:
    """Count a token's pass through the linear layers of one block."""
    return sum(_layer_flops(shape, name, adapter=adapter) for name in shape.linear_layers)


def _layer_flops(shape: ModelShape, name: str, *, adapter: LoraTuning | None) -> int:
    rows, columns = shape.linear_layers[name]
    count = 2 * rows * columns
    if adapter is not None and name in adapter.target_modules:
        count += 2 * adapter.rank * (rows + columns)
    return count


def _last_product_flops(shape: ModelShape, adapter: LoraTuning | None) -> int:
    """Count a block's last product, which nothing keeps: recomputation stops before it."""
    rows, columns = shape.linear_layers["down_proj"]
    if adapter is not None and "down_proj" in adapter.target_modules:
        return 2 * adapter.rank * rows
    return 2 * rows * columns


def _first_input_flops(shape: ModelShape, adapter: LoraTuning) -> int:
    """Count the gradient of the first block's input, which a frozen embedding does not need."""
    targets: Collection[str] = adapter.target_modules
    return sum(
        2 * rows * columns + (2 * adapter.rank * columns if name in targets else 0)
        for name, (rows, columns) in shape.linear_layers.items()
        if name in ("q_proj", "k_proj", "v_proj")
    )
