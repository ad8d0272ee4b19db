"""Differences between a quantized teacher's scores and the unquantized one's. Pure functions.

Shape letters: S sampled tokens of one rollout, N sampled tokens of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen3_distill.errors import DataError
from qwen3_distill.types import Rollout, TopKScore

METHOD = (
    "mean over tokens of KL(unquantized || served) between coarsened distributions: one outcome "
    "for every token that both teachers list among their candidates and for the sampled token, "
    "and one for all others; a lower bound of the full KL"
)
_TINY = 1e-12
"""Probability of the remaining outcome if rounding leaves none."""


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """Differences between two sets of scores of the same rollouts."""

    num_rollouts: int
    num_tokens: int
    mean_abs_nats: float
    """Mean |served - unquantized| of the sampled tokens' logprobs."""
    p99_abs_nats: float
    mean_nats: float
    """Mean of served - unquantized: the part that does not average out."""
    sign_flips: float
    """Share of tokens whose advantage (teacher minus behavior logprob) changes its sign."""
    kl_nats: float
    """KL(unquantized || served) a token; see `METHOD`."""


def compare_scores(
    rollouts: Sequence[Rollout], served: Sequence[TopKScore], unquantized: Sequence[TopKScore]
) -> PrecisionReport:
    """Return the differences between served and unquantized scores of the same rollouts.

    Raises:
        DataError: there are no rollouts.
    """
    if not rollouts:
        raise DataError("no rollouts to compare scores on")
    behavior_N = np.concatenate([rollout.behavior_logprobs for rollout in rollouts])
    served_N = np.concatenate([score.logprobs for score in served]).astype(np.float64)
    exact_N = np.concatenate([score.logprobs for score in unquantized]).astype(np.float64)
    gap_N = served_N - exact_N
    flips_N = np.sign(served_N - behavior_N) != np.sign(exact_N - behavior_N)
    kl_N = np.concatenate(
        [
            coarse_kl(rollout.response_ids[rollout.sampled_indices], exact, quantized)
            for rollout, exact, quantized in zip(rollouts, unquantized, served, strict=True)
        ]
    )
    return PrecisionReport(
        num_rollouts=len(rollouts),
        num_tokens=int(gap_N.size),
        mean_abs_nats=float(np.abs(gap_N).mean()),
        p99_abs_nats=float(np.quantile(np.abs(gap_N), 0.99)),
        mean_nats=float(gap_N.mean()),
        sign_flips=float(flips_N.mean()),
        kl_nats=float(kl_N.mean()),
    )


def coarse_kl(
    sampled_ids: NDArray[np.integer], p_score: TopKScore, q_score: TopKScore
) -> NDArray[np.float64]:
    """[S] KL(p || q) in nats over the tokens whose logprob both know, and the rest as one outcome.

    Merging outcomes can only lower a KL divergence, so each value is a lower bound.
    """
    values = [
        _coarse_kl_of_token(
            _known(int(token), p_score, position), _known(int(token), q_score, position)
        )
        for position, token in enumerate(sampled_ids)
    ]
    return np.array(values, dtype=np.float64)


def _known(token: int, score: TopKScore, position: int) -> dict[int, float]:
    """Return the known logprobs at one position, by token id: candidates and sampled token."""
    ids, logprobs = score.candidate_ids[position], score.candidate_logprobs[position]
    known = dict(zip(ids.tolist(), logprobs.tolist(), strict=True))
    return {**known, token: float(score.logprobs[position])}


def _coarse_kl_of_token(p_known: dict[int, float], q_known: dict[int, float]) -> float:
    shared = sorted(p_known.keys() & q_known.keys())
    log_p = np.array([p_known[token] for token in shared])
    log_q = np.array([q_known[token] for token in shared])
    p, q = np.exp(log_p), np.exp(log_q)
    p_rest, q_rest = max(1 - p.sum(), _TINY), max(1 - q.sum(), _TINY)
    return float((p * (log_p - log_q)).sum() + p_rest * np.log(p_rest / q_rest))
