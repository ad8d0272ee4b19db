"""Predicts the seconds of each stage of a step from shapes and rates. No torch.

A roofline (Williams, Waterman, Patterson 2009): a stage takes as long as its products need at the
device's rate, or its bytes at the memory's, each times the share that was measured
(`planning.rates`). A decode step's linear layers take the root of the sum of both squares, because
neither hides the other wholly. Formulas and what they leave out: docs/guide/time-plan.md.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from qwen3_distill.config import TuningConfig
from qwen3_distill.modeling.flops import (
    TrainedTokens,
    causal_pairs,
    head_flops,
    training_flops,
)
from qwen3_distill.modeling.shapes import ModelShape
from qwen3_distill.planning import rates as shares
from qwen3_distill.planning.rates import EFFICIENCY, Efficiency, Rates
from qwen3_distill.planning.work import Rollouts, decode_segments

Bound: TypeAlias = Literal[
    "compute", "weight bandwidth", "KV bandwidth", "logits bandwidth", "launches", "host"
]
BOUNDS: tuple[Bound, ...] = get_args(Bound)


@dataclass(frozen=True)
class StageTime:
    """Seconds of a stage, by what they are spent on; the parts add up."""

    parts: Mapping[Bound, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bound(self) -> Bound:
        """The bound that takes the largest part."""
        return max(self.parts, key=lambda bound: self.parts[bound])

    def times(self, factor: float) -> "StageTime":
        """Return the time of ``factor`` times the work."""
        return StageTime({bound: factor * seconds for bound, seconds in self.parts.items()})


def added(*times: StageTime) -> StageTime:
    """Return the time of stages one after another."""
    found: dict[Bound, float] = {}
    for time in times:
        for bound, seconds in time.parts.items():
            found[bound] = found.get(bound, 0.0) + seconds
    return StageTime(found)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as an engine computes with it."""

    shape: ModelShape
    itemsize: int
    """Bytes of a weight that is not in FP8, and of a cached value."""
    fp8: bool = False
    """Whether the linear layers are in FP8."""
    fp8_blocks: bool = False
    """Whether FP8 has a scale per block instead of per channel."""
    float32_head: bool = False
    """Whether the output head multiplies in float32 after casting it for every part."""
    tf32_head: bool = False
    """Whether that product is in TF32."""
    linear_bytes: int | None = None
    """Bytes of the linear layers where they are in yet another format."""
    kv_itemsize: int | None = None
    """Bytes of a cached value; None: as ``itemsize``."""

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that a decode step reads: linear layers and the output head."""
        head = self.shape.vocab_size * self.shape.hidden_size * self.itemsize
        if self.linear_bytes is not None:
            return self.linear_bytes + head
        return self.shape.linear_parameters * (1 if self.fp8 else self.itemsize) + head

    @property
    def kv_bytes(self) -> int:
        """Bytes of a cached token."""
        return self.shape.kv_bytes_per_token(self.kv_itemsize or self.itemsize)

    def products(self, rates: Rates) -> float:
        """Operations per second of its linear layers, at most."""
        if self.itemsize == 4 and not self.fp8:
            return rates.fp32_flops
        return rates.products(fp8=self.fp8)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings of a sampling engine that its speed depends on."""

    max_sequences: int
    eager_kernels: int | None = None
    """Kernels of a layer that the host launches one by one; None: a step is one CUDA graph."""
    adapter: bool = False
    """Whether an adapter is applied beside the weights."""


def decode_step(
    model: Model, rates: Rates, decoding: Decoding, batch: int, share: Efficiency = EFFICIENCY
) -> StageTime:
    """Predict one decode step of ``batch`` sequences, without reading their caches."""
    shape = model.shape
    weights_s = model.read_bytes / rates.weight_bandwidth
    products_s = 2 * shape.linear_parameters * batch / model.products(rates)
    products_s += head_flops(shape, batch) / rates.bf16_flops
    both = math.hypot(weights_s, products_s) / share.decode_products
    part = weights_s**2 / (weights_s**2 + products_s**2)
    kernels, kernel_s = share.decode_kernels_per_layer, rates.graph_kernel_s
    if decoding.eager_kernels is not None:
        kernels, kernel_s = decoding.eager_kernels, rates.launch_s
    if decoding.adapter:
        kernels += shares.ADAPTER_KERNELS_PER_LAYER
    logits = 4 * batch * shape.vocab_size * share.logits_passes
    return StageTime(
        {
            "weight bandwidth": part * both,
            "compute": (1 - part) * both,
            "logits bandwidth": logits / rates.bandwidth,
            "launches": shape.num_layers * kernels * kernel_s,
            "host": share.decode_step_s,
        }
    )


def cache_reads(
    model: Model, rates: Rates, tokens: float, share: Efficiency = EFFICIENCY
) -> StageTime:
    """Predict attention of decode steps that read ``tokens`` cached tokens in all."""
    return StageTime({"KV bandwidth": tokens * model.kv_bytes / (share.kv_reads * rates.bandwidth)})


def prefill(
    model: Model, rates: Rates, rollouts: Rollouts, share: Efficiency = EFFICIENCY
) -> StageTime:
    """Predict the prompts' passes before sampling: each prompt's once."""
    shape, prompts = model.shape, rollouts.prefilled / max(1, rollouts.prompt_tokens)
    pairs = prompts * causal_pairs(rollouts.prompt_tokens)
    linear = 2 * shape.linear_parameters * rollouts.prefilled / model.products(rates)
    attention = 4 * shape.num_layers * shape.query_size * pairs / rates.bf16_flops
    return StageTime({"compute": linear / share.prefill + attention / shares.ATTENTION_SHARE})


def sampling(
    model: Model,
    rates: Rates,
    decoding: Decoding,
    rollouts: Rollouts,
    share: Efficiency = EFFICIENCY,
) -> StageTime:
    """Predict sampling of all rollouts, begun together, each freed place taken by the next."""
    if not rollouts.responses:
        return StageTime({"compute": 0.0})
    steps: dict[int, int] = {}
    read_tokens = 0
    width = decoding.max_sequences
    if rollouts.count > len(rollouts.responses):
        width = max(1, min(width, len(rollouts.responses)))
    for segment in decode_segments(rollouts.responses, rollouts.prompt_tokens, width):
        steps[segment.batch] = steps.get(segment.batch, 0) + segment.steps
        read_tokens += segment.read_tokens
    times = [
        decode_step(model, rates, decoding, batch, share).times(count)
        for batch, count in steps.items()
    ]
    decoded = added(*times, cache_reads(model, rates, read_tokens, share))
    return added(decoded.times(rollouts.weight), prefill(model, rates, rollouts, share))


def steady_sampling(
    model: Model,
    rates: Rates,
    decoding: Decoding,
    rollouts: Rollouts,
    share: Efficiency = EFFICIENCY,
) -> StageTime:
    """Predict sampling where decoding never runs empty, as in a streaming pipeline.

    A token is sampled at half its rollout's length on average, weighted by length.
    """
    batch = decoding.max_sequences
    squares = rollouts.weight * sum(tokens * tokens for tokens in rollouts.responses)
    read_tokens = rollouts.new_tokens * rollouts.prompt_tokens + squares / 2
    step = decode_step(model, rates, decoding, batch, share)
    return added(
        step.times(rollouts.new_tokens / batch),
        cache_reads(model, rates, read_tokens, share),
        prefill(model, rates, rollouts, share),
    )


def scoring(
    model: Model,
    rates: Rates,
    rollouts: Rollouts,
    *,
    chunk_tokens: int,
    candidates: bool = False,
    share: Efficiency = EFFICIENCY,
) -> StageTime:
    """Predict the teacher's pass over prompts and responses.

    Args:
        chunk_tokens: rows of logits at a time; a float32 head is cast for each part.
        candidates: SGLang names its most likely tokens at every token of a response.
    """
    shape, rows = model.shape, rollouts.new_tokens
    reached = share.prefill
    if model.fp8 and rates.fp8_flops is not None:
        reached = share.score_fp8_blocks if model.fp8_blocks else share.score_fp8
    linear = 2 * shape.linear_parameters * rollouts.tokens / (reached * model.products(rates))
    attention = 4 * shape.num_layers * shape.query_size * rollouts.pairs
    attention /= shares.ATTENTION_SHARE * rates.bf16_flops
    head = head_flops(shape, 1) * rows
    logits = rows * shape.vocab_size * 20
    if model.float32_head:
        head_rate = shares.FLOAT32_SHARE * rates.fp32_flops
        if model.tf32_head:  # half as many products as in bfloat16
            head_rate = max(head_rate, share.prefill * rates.bf16_flops / 2)
        head_s = head / head_rate
        logits += 10 * shape.hidden_size * shape.vocab_size * math.ceil(rows / chunk_tokens)
    else:
        head_s = head / (share.prefill * rates.bf16_flops)
    logits_s = logits / (shares.BANDWIDTH_SHARE * rates.bandwidth)
    found: dict[Bound, float] = {
        "compute": linear + attention + head_s,
        "logits bandwidth": logits_s,
    }
    if candidates:
        found["host"] = share.candidates_s_per_token * rows
    return StageTime(found)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a learner that its speed depends on."""

    tuning: TuningConfig
    micro_batches: Sequence[Sequence[int]]
    """Lengths of the sequences of each micro-batch, prompts included."""
    prompts: Sequence[int] | None = None
    """Prompts that are computed in each micro-batch; None: every sequence's own."""
    packed: bool = False
    """Whether sequences are laid end to end instead of padded to the longest."""
    recomputed_layers: int = 0
    kernels_per_layer: int = shares.TRAIN_KERNELS_PER_LAYER
    float32: bool = False
    """Whether products are in float32."""
    float32_weights: bool = False
    """Whether the weights are in float32 and are cast for every micro-batch."""
    own_attention: bool = False
    """Whether unsloth's layers take our attention in place of theirs."""
    fp8_backward: bool = False
    """Whether the gradient passes through frozen layers in FP8."""
    candidates: bool = False
    """Whether the objective is over the teacher's candidates."""

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt stands before more than one answer."""
        computed = self.prompts
        return computed is not None and sum(computed) < sum(map(len, self.micro_batches))

    def rate(self, rates: Rates, share: Efficiency) -> float:
        """Return its rate over that of the sampled token, layers as loaded and their attention."""
        rate = 1.0
        if self.own_attention:
            rate = share.train_own_attention if self.shares_prompts else share.train_packed_rows
        if self.fp8_backward and rates.fp8_flops is not None:
            rate *= share.train_fp8_backward
        return rate * (share.train_candidates if self.candidates else 1.0)


def training(
    shape: ModelShape,
    rates: Rates,
    work: Training,
    rollouts: Rollouts,
    share: Efficiency = EFFICIENCY,
) -> StageTime:
    """Predict an optimizer step: forward, backward, what is recomputed, and the optimizer."""
    peak = rates.fp32_flops if work.float32 else rates.bf16_flops
    kernels = shape.num_layers * work.kernels_per_layer * rates.launch_s
    memory = shares.BANDWIDTH_SHARE * rates.bandwidth
    compute_s, waiting_s, cast_s = 0.0, 0.0, 0.0
    prompts = work.prompts or [len(lengths) for lengths in work.micro_batches]
    batches = Counter(zip(map(tuple, work.micro_batches), prompts, strict=True))
    for (lengths, computed), times in batches.items():
        ragged = not work.packed and min(lengths) < max(lengths)
        spared = len(lengths) - computed  # prompts that stand once before several answers
        tokens = sum(lengths) if work.packed else len(lengths) * max(lengths)
        trained = TrainedTokens(
            tokens=tokens - spared * rollouts.prompt_tokens,
            pairs=0,
            loss_tokens=sum(lengths) - len(lengths) * rollouts.prompt_tokens,
            recomputed_loss_tokens=0,
            recomputed_layers=work.recomputed_layers,
        )
        own = training_flops(shape, work.tuning, trained) / (share.train * peak)
        # With padding, attention takes a mask, and computes what the mask hides.
        pairs = sum(map(causal_pairs, lengths)) if not ragged else len(lengths) * max(lengths) ** 2
        pairs -= spared * causal_pairs(rollouts.prompt_tokens)
        passes = 3 * shape.num_layers + work.recomputed_layers
        reached = share.train_masked_attention if ragged else shares.ATTENTION_SHARE
        own += 4 * shape.query_size * passes * pairs / (reached * peak)
        own /= work.rate(rates, share)
        compute_s += times * own
        waiting_s += times * max(0.0, kernels - own)
        if work.float32_weights and not work.float32:
            cast_s += times * 6 * shape.num_parameters / memory
    full = work.tuning.kind == "full"
    optimizer_s = 28 * shape.num_parameters / memory if full else 0.0
    step = StageTime(
        {
            "compute": compute_s,
            "launches": waiting_s,
            "weight bandwidth": cast_s,
        }
    )
    return added(step.times(rollouts.weight), StageTime({"weight bandwidth": optimizer_s}))


def publishing(
    weight_bytes: int, rates: Rates, *, adapter: bool, share: Efficiency = EFFICIENCY
) -> StageTime:
    """Predict how long new weights take to the sampling engine."""
    if adapter:
        return StageTime({"host": share.publish_adapter_s})
    return StageTime({"weight bandwidth": share.publish_passes * weight_bytes / rates.bandwidth})
