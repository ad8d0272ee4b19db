"""Divergences between student and teacher over many outcomes at every state.

Shape letters: B rows, T positions, N loss tokens, C tokens of a chunk, D hidden size,
V vocabulary, K candidates.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from qwen3_distill.config import (
    FullDivergence,
    TopKDivergence,
)
from qwen3_distill.modeling.head import (
    TokenStats,
    candidate_logits,
    entropy,
    logits_of,
    map_chunks,
)
from qwen3_distill.training.batching import HiddenMicroBatch, MicroBatch, TopKMicroBatch
from qwen3_distill.training.objectives.base import (
    LossTerms,
    ObjectiveSetup,
    common_metrics,
    mean_metric,
    require_hidden,
    require_top_k,
    weighted_mean,
)
from qwen3_distill.training.objectives.losses import (
    divergence,
    renormalized,
    with_tail_bin,
)

Chunk: TypeAlias = tuple[Tensor, ...]


class TopKObjective:
    """The divergence over the teacher's top k."""

    def __init__(self, setup: ObjectiveSetup[TopKDivergence]) -> None:
        self._config = setup.config
        self._chunk_tokens = setup.chunk_tokens
        self._exact_stats = setup.exact_token_stats()

    def terms(
        self, micro: MicroBatch, hidden_BTD: Tensor, head_VD: Tensor, denominator: float
    ) -> LossTerms:
        top_k = require_top_k(micro, self._config.k)
        hidden_ND = micro.at_loss_tokens(hidden_BTD)
        if self._exact_stats is not None and not head_VD.requires_grad:
            stats = self._exact_stats(hidden_ND, head_VD, micro.target_N)
            found = top_k_divergence_beside(top_k, hidden_ND, head_VD, stats, self._config)
        else:
            found = top_k_divergence(
                top_k, hidden_ND, head_VD, self._config, chunk_tokens=self._chunk_tokens
            )
        divergence_N, logprob_N, entropy_N, mass_N = found
        metrics = [
            *common_metrics(micro, logprob_N, entropy_N),
            mean_metric("loss/divergence_nats", divergence_N),
            mean_metric("health/student_mass_on_top_k", mass_N),
            mean_metric("health/teacher_mass_on_top_k", top_k.candidate_logprob_NK.exp().sum(-1)),
        ]
        loss = weighted_mean(micro, divergence_N, denominator)
        return LossTerms(loss, tuple(metrics), divergence_N.detach())


class FullObjective:
    """The divergence over the whole vocabulary."""

    def __init__(self, setup: ObjectiveSetup[FullDivergence]) -> None:
        self._config = setup.config
        self._teacher_head_VD = setup.require_teacher_head()
        self._chunk_tokens = setup.chunk_tokens

    def terms(
        self, micro: MicroBatch, hidden_BTD: Tensor, head_VD: Tensor, denominator: float
    ) -> LossTerms:
        divergence_N, logprob_N, entropy_N = full_divergence(
            require_hidden(micro),
            micro.at_loss_tokens(hidden_BTD),
            head_VD,
            self._teacher_head_VD,
            self._config,
            self._chunk_tokens,
        )
        metrics = [
            *common_metrics(micro, logprob_N, entropy_N),
            mean_metric("loss/divergence_nats", divergence_N),
        ]
        loss = weighted_mean(micro, divergence_N, denominator)
        return LossTerms(loss, tuple(metrics), divergence_N.detach())


def top_k_divergence(
    micro: TopKMicroBatch,
    hidden_ND: Tensor,
    head_VD: Tensor,
    config: TopKDivergence,
    *,
    chunk_tokens: int,
) -> Chunk:
    """Return [N] each: divergence, target logprob, entropy, student's mass on the candidates."""

    def chunk(hidden_CD: Tensor, target_C: Tensor, ids_CK: Tensor, teacher_CK: Tensor) -> Chunk:
        logprob_CV = torch.log_softmax(logits_of(hidden_CD, head_VD), dim=-1)
        student_CK = logprob_CV.gather(-1, ids_CK)
        divergence_C = _of_candidates(student_CK, teacher_CK, config)
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


def top_k_divergence_beside(
    micro: TopKMicroBatch,
    hidden_ND: Tensor,
    head_VD: Tensor,
    stats: TokenStats,
    config: TopKDivergence,
) -> Chunk:
    """Return the same as `top_k_divergence`, given the targets' statistics; the head is frozen.

    A candidate's logprob is the target's plus the difference of the two logits, so that of all
    logits only those of k + 1 tokens are computed here. What computed the statistics must not have
    rounded the target's logit: the candidates would have its rounding.
    """
    id_NK = torch.cat([micro.candidate_id_NK, micro.target_N.unsqueeze(-1)], dim=-1)
    logit_NK = candidate_logits(hidden_ND, head_VD, id_NK)
    student_NK = logit_NK[:, :-1] - logit_NK[:, -1:] + stats.logprob_N.unsqueeze(-1)
    return (
        _of_candidates(student_NK, micro.candidate_logprob_NK, config),
        stats.logprob_N.detach(),
        stats.entropy_N,
        student_NK.detach().exp().sum(-1),
    )


def _of_candidates(student_CK: Tensor, teacher_CK: Tensor, config: TopKDivergence) -> Tensor:
    """Return [C]: the divergence of the candidates, closed to distributions."""
    close = with_tail_bin if config.tail == "bin" else renormalized
    return divergence(close(student_CK), close(teacher_CK), config.divergence, config.beta)


def full_divergence(
    micro: HiddenMicroBatch,
    hidden_ND: Tensor,
    head_VD: Tensor,
    teacher_head_VD: Tensor,
    config: FullDivergence,
    chunk_tokens: int,
) -> Chunk:
    """Return [N] each: divergence, target logprob, entropy."""

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
