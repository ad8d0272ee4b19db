"""The policy gradient of KL(student || teacher) on the sampled tokens.

Shape letters: B rows, T positions, N loss tokens, D hidden size, V vocabulary.
"""

from typing import cast

import torch
from torch import Tensor

from qwen3_distill.config import (
    FullDivergence,
    SampledReverseKL,
    TopKDivergence,
)
from qwen3_distill.errors import AlignmentError
from qwen3_distill.modeling.head import TokenStats
from qwen3_distill.training.batching import AlignedMicroBatch, MicroBatch
from qwen3_distill.training.objectives.base import (
    LossTerms,
    ObjectiveSetup,
    TensorMetric,
    common_metrics,
    max_metric,
    mean_metric,
    require_hidden,
    require_top_k,
)
from qwen3_distill.training.objectives.divergences import (
    full_divergence,
    top_k_divergence,
    top_k_divergence_beside,
)
from qwen3_distill.training.objectives.losses import SampledTerms, sampled_reverse_kl
from qwen3_distill.types import Reduction


class SampledObjective:
    """`sampled_reverse_kl` of `losses`, with its baseline."""

    def __init__(self, setup: ObjectiveSetup[SampledReverseKL]) -> None:
        self._config = setup.config
        full = setup.config.kl_baseline.kind == "full"
        self._teacher_head_VD = setup.require_teacher_head() if full else None
        self._chunk_tokens = setup.chunk_tokens
        self._token_stats = setup.token_stats()
        self._has_exact_stats = setup.exact_token_stats() is not None

    def terms(
        self, micro: MicroBatch, hidden_BTD: Tensor, head_VD: Tensor, denominator: float
    ) -> LossTerms:
        hidden_ND = micro.at_loss_tokens(hidden_BTD)
        stats = self._token_stats(hidden_ND, head_VD, micro.target_N)
        if isinstance(micro, AlignedMicroBatch):
            sampled = self._by_span(micro, stats.logprob_N, denominator)
            found = [*common_metrics(micro, stats.logprob_N, stats.entropy_N)]
            metrics = [*found, *_span_metrics(micro, sampled), *self._metrics(sampled)]
            return LossTerms(
                sampled.loss, tuple(metrics), micro.per_token(sampled.advantage_N.abs())
            )
        sampled = sampled_reverse_kl(
            stats.logprob_N,
            micro.behavior_logprob_N,
            micro.teacher_logprob_N,
            self._baseline(micro, hidden_ND.detach(), head_VD.detach(), stats),
            micro.importance_weight_N,
            micro.task_advantage_N,
            tokens_per_row=micro.loss_tokens,
            denominator=denominator,
            ratio_cap=self._config.ratio_cap,
            advantage_clip=self._config.advantage_clip,
            discount=self._config.discount,
        )
        found = common_metrics(micro, stats.logprob_N, stats.entropy_N)
        metrics = [*found, *self._metrics(sampled)]
        return LossTerms(sampled.loss, tuple(metrics), sampled.advantage_N.abs())

    def _by_span(
        self, micro: AlignedMicroBatch, logprob_N: Tensor, denominator: float
    ) -> SampledTerms:
        """Return the same loss with spans in place of tokens (docs/concepts/objective.md).

        A span is one action: its logprobs are the sums over its tokens. Each of its tokens thus has
        the span's whole signal and ratio in its gradient.

        Raises:
            AlignmentError: the objective has a baseline, which spans have none for.
        """
        if self._config.kl_baseline.kind != "none":
            raise AlignmentError(
                f"kl_baseline.kind={self._config.kl_baseline.kind} with scores of spans: the "
                "teacher's candidates are of another vocabulary; use kl_baseline.kind=none"
            )
        return sampled_reverse_kl(
            micro.per_span(logprob_N),
            micro.per_span(micro.behavior_logprob_N),
            micro.span_logprob_P,
            torch.zeros_like(micro.span_logprob_P),
            micro.of_first_token(micro.importance_weight_N),
            micro.of_first_token(micro.task_advantage_N),
            tokens_per_row=micro.spans_per_sequence,
            denominator=denominator,
            ratio_cap=self._config.ratio_cap,
            advantage_clip=self._config.advantage_clip,
            discount=self._config.discount,
        )

    def _metrics(self, sampled: SampledTerms) -> list[TensorMetric]:
        metrics = [
            max_metric("health/ratio_max", sampled.ratio_N),
            mean_metric("loss/advantage_abs_nats", sampled.advantage_N.abs()),
        ]
        if self._config.ratio_cap is not None:
            capped_N = sampled.ratio_N > self._config.ratio_cap
            metrics.append(mean_metric("health/ratio_capped_fraction", capped_N.float()))
        if self._config.advantage_clip is not None:
            clipped_N = sampled.signal_N.abs() > self._config.advantage_clip
            metrics.append(mean_metric("health/advantage_clipped_fraction", clipped_N.float()))
        return metrics

    @torch.no_grad()
    def _baseline(
        self, micro: MicroBatch, hidden_ND: Tensor, head_VD: Tensor, stats: TokenStats
    ) -> Tensor:
        """Return b_t [N]: KL(student || teacher) at each state, or 0."""
        baseline = self._config.kl_baseline
        if baseline.kind == "none":
            return hidden_ND.new_zeros(hidden_ND.shape[0], dtype=torch.float32)
        if baseline.kind == "top_k":
            top_k = require_top_k(micro, baseline.k)
            if self._has_exact_stats:
                return top_k_divergence_beside(top_k, hidden_ND, head_VD, stats, _TOP_K_BASELINE)[0]
            return top_k_divergence(
                top_k, hidden_ND, head_VD, _TOP_K_BASELINE, chunk_tokens=self._chunk_tokens
            )[0]
        teacher_head_VD = cast(Tensor, self._teacher_head_VD)
        return full_divergence(
            require_hidden(micro),
            hidden_ND,
            head_VD,
            teacher_head_VD,
            _FULL_BASELINE,
            self._chunk_tokens,
        )[0]


def _span_metrics(micro: AlignedMicroBatch, sampled: SampledTerms) -> list[TensorMetric]:
    """Return the reverse KL per token, as every objective reports it, and the spans' mean size."""
    num_tokens = micro.target_N.numel()
    kl = -sampled.signal_N.detach().sum()
    size = torch.full_like(kl, num_tokens)
    return [
        TensorMetric("loss/reverse_kl_nats", kl, num_tokens, Reduction.MEAN),
        TensorMetric("score/tokens_per_span", size, micro.span_logprob_P.numel(), Reduction.MEAN),
    ]


_TOP_K_BASELINE = TopKDivergence(kind="top_k", divergence="reverse_kl", tail="bin")
_FULL_BASELINE = FullDivergence(kind="full", divergence="reverse_kl")
