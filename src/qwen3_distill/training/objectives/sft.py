"""Supervised fine-tuning on the tokens that a teacher sampled.

Shape letters: B rows, T positions, N loss tokens, D hidden size, V vocabulary.
"""

from torch import Tensor

from qwen3_distill.config import CrossEntropy
from qwen3_distill.training.batching import MicroBatch
from qwen3_distill.training.objectives.base import (
    LossTerms,
    ObjectiveSetup,
    common_metrics,
    weighted_mean,
)


class SftObjective:
    """The cross-entropy of the sampled tokens: the mean of -log pi_theta(a_t)."""

    def __init__(self, setup: ObjectiveSetup[CrossEntropy]) -> None:
        self._token_stats = setup.token_stats()

    def terms(
        self, micro: MicroBatch, hidden_BTD: Tensor, head_VD: Tensor, denominator: float
    ) -> LossTerms:
        stats = self._token_stats(micro.at_loss_tokens(hidden_BTD), head_VD, micro.target_N)
        loss = weighted_mean(micro, -stats.logprob_N, denominator)
        metrics = tuple(common_metrics(micro, stats.logprob_N, stats.entropy_N))
        return LossTerms(loss, metrics, -stats.logprob_N.detach())
