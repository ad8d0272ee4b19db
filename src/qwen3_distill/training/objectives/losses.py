"""Losses as functions of tensors; no function knows a config. Sources: docs/concepts/objective.md.

Tensors hold loss tokens only. Padding never enters the arithmetic: 0 * nan is nan, and a mask
applied afterwards would keep it.

Shape letters: N loss tokens of a micro-batch, V vocabulary, K teacher candidates. Nats, float32.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Divergence: TypeAlias = Literal["reverse_kl", "forward_kl", "jsd"]

MIN_TAIL_MASS = 1e-6
"""1 - mass is exact to about 6e-8 in float32; below this the tail's logprob would be noise."""


class SampledTerms(NamedTuple):
    """The sampled-token loss and the values for its metrics; only ``loss`` has a gradient."""

    loss: Tensor
    """Scalar: this micro-batch's share of the step's loss."""
    ratio_N: Tensor
    """pi_theta(a_t) / mu(a_t), before the cap."""
    advantage_N: Tensor
    """A_t as used in the loss."""
    signal_N: Tensor
    """log q(a_t) - log pi_theta(a_t) + b_t before clip and discount."""


def sampled_reverse_kl(
    learner_logprob_N: Tensor,
    behavior_logprob_N: Tensor,
    teacher_logprob_N: Tensor,
    baseline_N: Tensor,
    importance_weight_N: Tensor,
    task_advantage_N: Tensor,
    *,
    tokens_per_row: Sequence[int],
    denominator: float,
    ratio_cap: float | None,
    advantage_clip: float | None,
    discount: float = 0.0,
) -> SampledTerms:
    """Return the policy-gradient surrogate of KL(student || teacher) on the sampled tokens.

        rho_t = min(pi_theta(a_t) / mu(a_t), c)
        A_t   = clip(log q(a_t) - log pi_theta(a_t) + b_t, -a, a)
        loss  = - sum_t w_i rho_t A_t log pi_theta(a_t) / denominator

    Everything but the last log pi_theta is detached. The advantage uses the current student: the
    KL is a functional of theta, and with rho the expected gradient is exact for stale samples too.

    Args:
        learner_logprob_N: log pi_theta(a_t), with gradient.
        behavior_logprob_N: log mu(a_t), of the distribution sampled from.
        teacher_logprob_N: log q(a_t).
        baseline_N: b_t >= 0, any value that does not depend on a_t.
        importance_weight_N: w_i of the token's rollout.
        task_advantage_N: added to A_t after the clip.
        tokens_per_row: loss tokens of each rollout, in order; they sum to N. A response token that
            was not sampled is none of them.
        denominator: sum_i w_i n_i of the *whole step*, all micro-batches. Never this
            micro-batch's own count, or short batches would weigh more per token.
        ratio_cap: c; None takes rho = 1.
        advantage_clip: a; None does not clip.
        discount: weight per step of later tokens' clipped signals in A_t. Steps count sampled
            tokens in order: tokens between two sampled spans take no part in it.
    """
    learner_N = learner_logprob_N.detach()
    ratio_N = torch.exp(learner_N - behavior_logprob_N)
    used_ratio_N = torch.ones_like(ratio_N) if ratio_cap is None else ratio_N.clamp(max=ratio_cap)
    signal_N = teacher_logprob_N - learner_N + baseline_N
    advantage_N = signal_N
    if advantage_clip is not None:
        advantage_N = signal_N.clamp(-advantage_clip, advantage_clip)
    if discount > 0:
        advantage_N = discounted_suffix_sum(advantage_N, tokens_per_row, discount)
    advantage_N = advantage_N + task_advantage_N
    weighted_N = importance_weight_N * used_ratio_N * advantage_N
    loss = -(weighted_N * learner_logprob_N).sum() / denominator
    return SampledTerms(loss, ratio_N, advantage_N, signal_N)


class PolicyTerms(NamedTuple):
    """The group-relative loss and the values for its metrics; only ``loss`` has a gradient."""

    loss: Tensor
    """Scalar: this micro-batch's share of the step's loss."""
    ratio_N: Tensor
    """pi_theta(a_t) / mu(a_t), before the clip."""
    is_clipped_N: Tensor
    """bool: the token has no gradient, because its ratio is beyond the clip."""


def group_relative_policy(
    learner_logprob_N: Tensor,
    behavior_logprob_N: Tensor,
    advantage_N: Tensor,
    importance_weight_N: Tensor,
    *,
    denominator: float,
    clip_low: float | None,
    clip_high: float | None,
) -> PolicyTerms:
    """Return the clipped policy-gradient surrogate of GRPO (arXiv 2402.03300, eq. 3).

        rho_t = pi_theta(a_t) / mu(a_t)
        loss  = - sum_t w_i min(rho_t A_i, clip(rho_t, 1 - e_low, 1 + e_high) A_i) / denominator

    Without its KL to a reference model, and with one denominator for the tokens of all answers
    (DAPO, arXiv 2503.14476): a mean per answer would weigh the tokens of long wrong answers less
    (Dr. GRPO, arXiv 2503.20783). mu is the distribution really sampled from.

    Args:
        learner_logprob_N: log pi_theta(a_t), with gradient.
        behavior_logprob_N: log mu(a_t).
        advantage_N: A_i of the token's rollout: its reward relative to its prompt's samples.
        importance_weight_N: w_i of the token's rollout.
        denominator: sum_i w_i n_i of the *whole step*, all micro-batches.
        clip_low: e_low; None takes rho = 1, so that its gradient is that of log pi_theta(a_t).
        clip_high: e_high, if there is an e_low.
    """
    ratio_N = torch.exp(learner_logprob_N - behavior_logprob_N)
    if clip_low is None or clip_high is None:
        gain_N = advantage_N * learner_logprob_N
        is_clipped_N = torch.zeros_like(ratio_N, dtype=torch.bool)
    else:
        free_N = ratio_N * advantage_N
        bound_N = ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantage_N
        gain_N = torch.minimum(free_N, bound_N)
        is_clipped_N = bound_N.detach() < free_N.detach()
    loss = -(importance_weight_N * gain_N).sum() / denominator
    return PolicyTerms(loss, ratio_N.detach(), is_clipped_N)


def discounted_suffix_sum(
    values_N: Tensor, tokens_per_row: Sequence[int], discount: float
) -> Tensor:
    """Return [N]: v_t + discount v_{t+1} + discount^2 v_{t+2} + ... within each row."""
    padded_BR = pad_sequence(list(values_N.split(list(tokens_per_row))), batch_first=True)
    sums_BR = padded_BR.clone()
    for r in reversed(range(sums_BR.shape[1] - 1)):
        sums_BR[:, r] += discount * sums_BR[:, r + 1]
    rows = zip(sums_BR, tokens_per_row, strict=True)
    return torch.cat([row_R[:size] for row_R, size in rows])


def divergence(
    student_logprob_NX: Tensor, teacher_logprob_NX: Tensor, kind: Divergence, beta: float | None
) -> Tensor:
    """Return [N]: the divergence of two distributions over the same X outcomes.

    ``reverse_kl`` is KL(student || teacher), ``forward_kl`` is KL(teacher || student). ``jsd`` is
    the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649): with the mixture
    M = beta teacher + (1 - beta) student, beta KL(teacher || M) + (1 - beta) KL(student || M).
    Its gradient flows through the student's logprobs, also inside the mixture.
    """
    if kind == "reverse_kl":
        return _kl(student_logprob_NX, teacher_logprob_NX)
    if kind == "forward_kl":
        return _kl(teacher_logprob_NX, student_logprob_NX)
    if beta is None:
        raise ValueError("jsd needs beta")
    mixture_NX = torch.logaddexp(
        teacher_logprob_NX + math.log(beta), student_logprob_NX + math.log(1 - beta)
    )
    return beta * _kl(teacher_logprob_NX, mixture_NX) + (1 - beta) * _kl(
        student_logprob_NX, mixture_NX
    )


def _kl(p_logprob_NX: Tensor, q_logprob_NX: Tensor) -> Tensor:
    return (p_logprob_NX.exp() * (p_logprob_NX - q_logprob_NX)).sum(-1)


def with_tail_bin(logprob_NK: Tensor) -> Tensor:
    """Return [N, K + 1]: the K outcomes and one for all others; each row sums to 1.

    A tail below `MIN_TAIL_MASS` is set to that mass and has no gradient.
    """
    tail_N1 = (1 - logprob_NK.exp().sum(-1, keepdim=True)).clamp(min=MIN_TAIL_MASS)
    return torch.cat([logprob_NK, tail_N1.log()], dim=-1)


def renormalized(logprob_NK: Tensor) -> Tensor:
    """Return [N, K]: the K outcomes divided by their total mass."""
    return logprob_NK - logprob_NK.logsumexp(-1, keepdim=True)
