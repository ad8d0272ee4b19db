"""What every objective is made of: the protocol, its result, metrics and shared helpers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwen3_distill.errors import AlignmentError
from qwen3_distill.training.batching import HiddenMicroBatch, MicroBatch, TopKMicroBatch
from qwen3_distill.types import Metric, Reduction


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


def weighted_mean(micro: MicroBatch, values_N: Tensor, denominator: float) -> Tensor:
    return (micro.importance_weight_N * values_N).sum() / denominator


def mean_metric(key: str, values_N: Tensor) -> TensorMetric:
    return TensorMetric(key, values_N.detach().sum(), values_N.numel(), Reduction.MEAN)


def max_metric(key: str, values_N: Tensor) -> TensorMetric:
    return TensorMetric(key, values_N.detach().max(), 1, Reduction.MAX)


def common_metrics(micro: MicroBatch, logprob_N: Tensor, entropy_N: Tensor) -> list[TensorMetric]:
    """What every objective reports about the sampled tokens."""
    logprob_N = logprob_N.detach()
    engine_gap_N = (logprob_N - micro.behavior_logprob_N).abs()
    return [
        mean_metric("loss/reverse_kl_nats", logprob_N - micro.teacher_logprob_N),
        mean_metric("loss/entropy_nats", entropy_N),
        mean_metric("health/learner_vs_engine_abs_nats", engine_gap_N),
        max_metric("health/learner_vs_engine_max_nats", engine_gap_N),
    ]


def require_top_k(micro: MicroBatch, k: int) -> TopKMicroBatch:
    if not isinstance(micro, TopKMicroBatch) or micro.candidate_id_NK.shape[-1] != k:
        raise AlignmentError(f"this objective needs the teacher's top {k} at every position")
    return micro


def require_hidden(micro: MicroBatch) -> HiddenMicroBatch:
    if not isinstance(micro, HiddenMicroBatch):
        raise AlignmentError("this objective needs the teacher's hidden states at every position")
    return micro
