"""Group-relative policy optimization: the verifier's reward, and no teacher.

Shape letters: B rows, T positions, N loss tokens, D hidden size, V vocabulary.
"""

from torch import Tensor

from qwen3_distill.config import GroupRelativePolicy
from qwen3_distill.training.batching import MicroBatch
from qwen3_distill.training.objectives.base import (
    LossTerms,
    ObjectiveSetup,
    common_metrics,
    max_metric,
    mean_metric,
)
from qwen3_distill.training.objectives.losses import group_relative_policy


class GrpoObjective:
    """`group_relative_policy` of `losses`; the batch's task advantages are its advantages."""

    def __init__(self, setup: ObjectiveSetup[GroupRelativePolicy]) -> None:
        config = setup.config
        self._clip_low = config.clip
        self._clip_high = config.clip if config.clip_high is None else config.clip_high
        self._token_stats = setup.token_stats()

    def terms(
        self, micro: MicroBatch, hidden_BTD: Tensor, head_VD: Tensor, denominator: float
    ) -> LossTerms:
        stats = self._token_stats(micro.at_loss_tokens(hidden_BTD), head_VD, micro.target_N)
        policy = group_relative_policy(
            stats.logprob_N,
            micro.behavior_logprob_N,
            micro.task_advantage_N,
            micro.importance_weight_N,
            denominator=denominator,
            clip_low=self._clip_low,
            clip_high=self._clip_high,
        )
        magnitude_N = micro.task_advantage_N.abs()
        metrics = (
            *common_metrics(micro, stats.logprob_N, stats.entropy_N),
            max_metric("health/ratio_max", policy.ratio_N),
            mean_metric("health/ratio_clipped_fraction", policy.is_clipped_N.float()),
            mean_metric("loss/advantage_abs", magnitude_N),
        )
        return LossTerms(policy.loss, metrics, magnitude_N)
