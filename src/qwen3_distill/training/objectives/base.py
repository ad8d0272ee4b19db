"""From a config's objective and a micro-batch to a loss and its metrics.

One class per kind of objective. Each reads the student's hidden states, applies the output heads
in chunks, and calls the functions of `losses`.

Shape letters: B rows, T positions, N loss tokens, C tokens of a chunk, D hidden size,
V vocabulary, K candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias, cast

import torch
from torch import Tensor

from qwen3_distill.config import (
    FullDivergence,
    ObjectiveConfig,
    SampledReverseKL,
    TopKDivergence,
)
from qwen3_distill.errors import AlignmentError, ConfigError
from qwen3_distill.modeling.head import (
    TokenStatistics,
    entropy,
    logits_of,
    map_chunks,
    token_stats,
)
from qwen3_distill.training.batching import HiddenMicroBatch, MicroBatch, TopKMicroBatch
from qwen3_distill.training.objectives.losses import (
    divergence,
    renormalized,
    sampled_reverse_kl,
    with_tail_bin,
)
from qwen3_distill.types import Metric, Reduction

Chunk: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class TensorMetric:
    """A `Metric` that is still on the device: reading it there would wait for all work before."""

    key: str
    total: Tensor
    """Scalar, without gradient."""
    count: float
    reduction: Reduction

    def read(self, total: float) -> Metric:
        """The metric, once its total has been fetched."""
        return Metric(key=self.key, total=total, count=self.count, reduction=self.reduction)


@dataclass(frozen=True)
class LossTerms:
    """A micro-batch's share of the step."""

    loss: Tensor
    """Scalar with gradient; the shares of a step's micro-batches sum to the step's loss."""
    metrics: tuple[TensorMetric, ...]
    magnitude_N: Tensor
    """What a token has to teach, in nats, without gradient: its advantage's absolute value, or the
    divergence at its state. A rollout's mean is its priority in replay."""


def read_scalars(scalars: Sequence[Tensor]) -> list[float]:
    """Scalars of one device as numbers, in one transfer."""
    return torch.stack([scalar.detach().float() for scalar in scalars]).tolist()


class Objective(Protocol):
    """What the learner minimises."""

    def terms(
        self, micro: MicroBatch, hidden_BTD: Tensor, head_VD: Tensor, denominator: float
    ) -> LossTerms:
        """The loss of a micro-batch, from the student's hidden states and output head.

        Args:
            denominator: `Batch.denominator` of the whole step.
        """
        ...


def build_objective(
    config: ObjectiveConfig,
    *,
    teacher_head_VD: Tensor | None,
    chunk_tokens: int,
    token_statistics: TokenStatistics | None = None,
) -> Objective:
    """The objective of a config.

    Args:
        teacher_head_VD: the teacher's output head, for objectives over hidden states.
        chunk_tokens: rows of logits that exist at a time.
        token_statistics: how the sampled tokens' logprobs and entropies are computed; None: in
            chunks of logits. Other statistics always are.

    Raises:
        ConfigError: the objective needs the teacher's output head and there is none.
    """
    match config:
        case SampledReverseKL():
            full = config.kl_baseline.kind == "full"
            head_VD = _need_head(teacher_head_VD) if full else None
            return _SampledObjective(config, head_VD, chunk_tokens, token_statistics)
        case TopKDivergence():
            return _TopKObjective(config, chunk_tokens)
        case FullDivergence():
            return _FullObjective(config, _need_head(teacher_head_VD), chunk_tokens)


def _need_head(teacher_head_VD: Tensor | None) -> Tensor:
    if teacher_head_VD is None:
        raise ConfigError(
            "this objective needs the teacher's full distribution, and the scorer gives no "
            "hidden states; use scoring.kind=embedded, or objective.kind=top_k"
        )
    return teacher_head_VD


class _SampledObjective:
    def __init__(
        self,
        config: SampledReverseKL,
        teacher_head_VD: Tensor | None,
        chunk_tokens: int,
        token_statistics: TokenStatistics | None,
    ) -> None:
        self._config = config
        self._teacher_head_VD = teacher_head_VD
        self._chunk_tokens = chunk_tokens
        self._token_stats = token_statistics or partial(token_stats, chunk_tokens=chunk_tokens)

    def terms(
        self, micro: MicroBatch, hidden_BTD: Tensor, head_VD: Tensor, denominator: float
    ) -> LossTerms:
        hidden_ND = micro.at_loss_tokens(hidden_BTD)
        stats = self._token_stats(hidden_ND, head_VD, micro.target_N)
        sampled = sampled_reverse_kl(
            stats.logprob_N,
            micro.behavior_logprob_N,
            micro.teacher_logprob_N,
            self._baseline(micro, hidden_ND.detach(), head_VD.detach()),
            micro.importance_weight_N,
            micro.task_advantage_N,
            tokens_per_row=micro.loss_tokens,
            denominator=denominator,
            ratio_cap=self._config.ratio_cap,
            advantage_clip=self._config.advantage_clip,
            discount=self._config.discount,
        )
        metrics = [
            *_common_metrics(micro, stats.logprob_N, stats.entropy_N),
            _max("health/ratio_max", sampled.ratio_N),
            _mean("loss/advantage_abs_nats", sampled.advantage_N.abs()),
        ]
        if self._config.ratio_cap is not None:
            capped_N = sampled.ratio_N > self._config.ratio_cap
            metrics.append(_mean("health/ratio_capped_fraction", capped_N.float()))
        if self._config.advantage_clip is not None:
            clipped_N = sampled.signal_N.abs() > self._config.advantage_clip
            metrics.append(_mean("health/advantage_clipped_fraction", clipped_N.float()))
        return LossTerms(sampled.loss, tuple(metrics), sampled.advantage_N.abs())

    @torch.no_grad()
    def _baseline(self, micro: MicroBatch, hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
        """[N] b_t = KL(student || teacher) at each state, or 0."""
        baseline = self._config.kl_baseline
        if baseline.kind == "none":
            return hidden_ND.new_zeros(hidden_ND.shape[0], dtype=torch.float32)
        if baseline.kind == "top_k":
            top_k = _top_k(micro, baseline.k)
            return _top_k_divergence(
                top_k, hidden_ND, head_VD, _TOP_K_BASELINE, chunk_tokens=self._chunk_tokens
            )[0]
        teacher_head_VD = cast(Tensor, self._teacher_head_VD)
        return _full_divergence(
            _hidden(micro), hidden_ND, head_VD, teacher_head_VD, _FULL_BASELINE, self._chunk_tokens
        )[0]


_TOP_K_BASELINE = TopKDivergence(kind="top_k", divergence="reverse_kl", tail="bin")
_FULL_BASELINE = FullDivergence(kind="full", divergence="reverse_kl")


class _TopKObjective:
    def __init__(self, config: TopKDivergence, chunk_tokens: int) -> None:
        self._config = config
        self._chunk_tokens = chunk_tokens

    def terms(
        self, micro: MicroBatch, hidden_BTD: Tensor, head_VD: Tensor, denominator: float
    ) -> LossTerms:
        top_k = _top_k(micro, self._config.k)
        divergence_N, logprob_N, entropy_N, mass_N = _top_k_divergence(
            top_k,
            micro.at_loss_tokens(hidden_BTD),
            head_VD,
            self._config,
            chunk_tokens=self._chunk_tokens,
        )
        metrics = [
            *_common_metrics(micro, logprob_N, entropy_N),
            _mean("loss/divergence_nats", divergence_N),
            _mean("health/student_mass_on_top_k", mass_N),
            _mean("health/teacher_mass_on_top_k", top_k.candidate_logprob_NK.exp().sum(-1)),
        ]
        loss = _weighted_mean(micro, divergence_N, denominator)
        return LossTerms(loss, tuple(metrics), divergence_N.detach())


class _FullObjective:
    def __init__(self, config: FullDivergence, teacher_head_VD: Tensor, chunk_tokens: int) -> None:
        self._config = config
        self._teacher_head_VD = teacher_head_VD
        self._chunk_tokens = chunk_tokens

    def terms(
        self, micro: MicroBatch, hidden_BTD: Tensor, head_VD: Tensor, denominator: float
    ) -> LossTerms:
        divergence_N, logprob_N, entropy_N = _full_divergence(
            _hidden(micro),
            micro.at_loss_tokens(hidden_BTD),
            head_VD,
            self._teacher_head_VD,
            self._config,
            self._chunk_tokens,
        )
        metrics = [
            *_common_metrics(micro, logprob_N, entropy_N),
            _mean("loss/divergence_nats", divergence_N),
        ]
        loss = _weighted_mean(micro, divergence_N, denominator)
        return LossTerms(loss, tuple(metrics), divergence_N.detach())


def _top_k_divergence(
    micro: TopKMicroBatch,
    hidden_ND: Tensor,
    head_VD: Tensor,
    config: TopKDivergence,
    *,
    chunk_tokens: int,
) -> Chunk:
    """[N] each: divergence, target logprob, entropy, the student's mass on the candidates."""
    close = with_tail_bin if config.tail == "bin" else renormalized

    def chunk(hidden_CD: Tensor, target_C: Tensor, ids_CK: Tensor, teacher_CK: Tensor) -> Chunk:
        logprob_CV = torch.log_softmax(logits_of(hidden_CD, head_VD), dim=-1)
        student_CK = logprob_CV.gather(-1, ids_CK)
        divergence_C = divergence(
            close(student_CK), close(teacher_CK), config.divergence, config.beta
        )
        target_logprob_C = logprob_CV.detach().gather(-1, target_C.unsqueeze(-1)).squeeze(-1)
        return (
            divergence_C,
            target_logprob_C,
            entropy(logprob_CV),
            student_CK.detach().exp().sum(-1),
        )

    return map_chunks(
        chunk,
        (hidden_ND, micro.target_N, micro.candidate_id_NK, micro.candidate_logprob_NK),
        chunk_tokens=chunk_tokens,
    )


def _full_divergence(
    micro: HiddenMicroBatch,
    hidden_ND: Tensor,
    head_VD: Tensor,
    teacher_head_VD: Tensor,
    config: FullDivergence,
    chunk_tokens: int,
) -> Chunk:
    """[N] each: divergence, target logprob, entropy."""

    def chunk(hidden_CD: Tensor, teacher_hidden_CD: Tensor, target_C: Tensor) -> Chunk:
        logprob_CV = torch.log_softmax(logits_of(hidden_CD, head_VD), dim=-1)
        with torch.no_grad():
            teacher_CV = torch.log_softmax(logits_of(teacher_hidden_CD, teacher_head_VD), dim=-1)
        divergence_C = divergence(logprob_CV, teacher_CV, config.divergence, config.beta)
        target_logprob_C = logprob_CV.detach().gather(-1, target_C.unsqueeze(-1)).squeeze(-1)
        return divergence_C, target_logprob_C, entropy(logprob_CV)

    return map_chunks(
        chunk,
        (hidden_ND, micro.teacher_hidden_ND, micro.target_N),
        chunk_tokens=chunk_tokens,
    )


def _top_k(micro: MicroBatch, k: int) -> TopKMicroBatch:
    if not isinstance(micro, TopKMicroBatch) or micro.candidate_id_NK.shape[-1] != k:
        raise AlignmentError(f"this objective needs the teacher's top {k} at every position")
    return micro


def _hidden(micro: MicroBatch) -> HiddenMicroBatch:
    if not isinstance(micro, HiddenMicroBatch):
        raise AlignmentError("this objective needs the teacher's hidden states at every position")
    return micro


def _weighted_mean(micro: MicroBatch, values_N: Tensor, denominator: float) -> Tensor:
    return (micro.importance_weight_N * values_N).sum() / denominator


def _mean(key: str, values_N: Tensor) -> TensorMetric:
    return TensorMetric(key, values_N.detach().sum(), values_N.numel(), Reduction.MEAN)


def _max(key: str, values_N: Tensor) -> TensorMetric:
    return TensorMetric(key, values_N.detach().max(), 1, Reduction.MAX)


def _common_metrics(micro: MicroBatch, logprob_N: Tensor, entropy_N: Tensor) -> list[TensorMetric]:
    """What every objective reports about the sampled tokens."""
    logprob_N = logprob_N.detach()
    engine_gap_N = (logprob_N - micro.behavior_logprob_N).abs()
    return [
        _mean("loss/reverse_kl_nats", logprob_N - micro.teacher_logprob_N),
        _mean("loss/entropy_nats", entropy_N),
        _mean("health/learner_vs_engine_abs_nats", engine_gap_N),
        _max("health/learner_vs_engine_max_nats", engine_gap_N),
    ]
