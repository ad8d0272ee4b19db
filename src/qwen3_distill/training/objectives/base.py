"""The `Objective` protocol, what an objective is built from, what it returns, and helpers.

Shape letters: B rows, T positions, N loss tokens, D hidden size, V vocabulary, K candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from qwen3_distill.config import ObjectiveSchema
from qwen3_distill.errors import AlignmentError, ConfigError, DataError
from qwen3_distill.modeling.head import TokenStatistics, token_stats
from qwen3_distill.modeling.host_to_device import to_device
from qwen3_distill.training.batching import HiddenMicroBatch, MicroBatch, TopKMicroBatch
from qwen3_distill.types import Metric, Reduction, TrainingRollout

ConfigT = TypeVar("ConfigT", bound=ObjectiveSchema)


@dataclass(frozen=True, kw_only=True)
class ObjectiveSetup(Generic[ConfigT]):
    """The one constructor argument of every objective: all that it may need."""

    config: ConfigT
    teacher_head_VD: Tensor | None
    """The teacher's output head, where teacher and learner share a process."""
    chunk_tokens: int
    """Rows of logits that exist at a time."""
    token_statistics: TokenStatistics | None
    has_exact_statistics: bool = False
    """Whether `token_statistics` does not round logits."""

    def token_stats(self) -> TokenStatistics:
        """Return the function for the sampled tokens' logprobs and entropies."""
        return self.token_statistics or partial(token_stats, chunk_tokens=self.chunk_tokens)

    def exact_token_stats(self) -> TokenStatistics | None:
        """Return that function if candidates' logprobs may be put beside its results."""
        return self.token_statistics if self.has_exact_statistics else None

    def require_teacher_head(self) -> Tensor:
        """Return the teacher's output head.

        Raises:
            ConfigError: there is none.
        """
        if self.teacher_head_VD is None:
            raise ConfigError(
                "this objective needs the teacher's full distribution, and the scorer gives no "
                "hidden states; use scoring.kind=embedded, or objective.kind=top_k"
            )
        return self.teacher_head_VD


@dataclass(frozen=True)
class TensorMetric:
    """A `Metric` whose total is still on the device: reading it waits for all queued work."""

    key: str
    total: Tensor
    """Scalar, without gradient."""
    count: float
    reduction: Reduction

    def read(self, total: float) -> Metric:
        """Return the metric, given its fetched total."""
        return Metric(key=self.key, total=total, count=self.count, reduction=self.reduction)


@dataclass(frozen=True)
class LossTerms:
    """A micro-batch's share of the step."""

    loss: Tensor
    """Scalar with gradient; the shares of a step's micro-batches sum to the step's loss."""
    metrics: tuple[TensorMetric, ...]
    magnitude_N: Tensor
    """How much each token has to teach, in nats, without gradient: its advantage's absolute
    value, or the divergence at its state. A rollout's mean is its priority in replay."""


def read_scalars(scalars: Sequence[Tensor]) -> list[float]:
    """Return scalars of one device as numbers, in one transfer."""
    return torch.stack([scalar.detach().float() for scalar in scalars]).tolist()


class Objective(Protocol):
    """Computes the loss that the learner minimises. Constructed from an `ObjectiveSetup`."""

    def terms(
        self, micro: MicroBatch, hidden_BTD: Tensor, head_VD: Tensor, denominator: float
    ) -> LossTerms:
        """Return a micro-batch's share of the step's loss.

        Args:
            hidden_BTD: the student's last hidden states, with gradient.
            head_VD: the student's output head, with gradient.
            denominator: `Batch.denominator` of the whole step.
        """
        ...


def check_samplers(objective: ObjectiveSchema, scored: Sequence[TrainingRollout]) -> None:
    """Raise DataError for a rollout whose sampler the objective does not learn from."""
    require_samplers(objective, {s.rollout.sampled_by: s.rollout.rollout_id for s in scored})


def require_samplers(objective: ObjectiveSchema, example_of: Mapping[str, str]) -> None:
    """Raise DataError for a sampler that the objective does not learn from.

    Args:
        example_of: by sampler, the id of a rollout of it.
    """
    for sampler, rollout_id in example_of.items():
        if sampler not in objective.learns_from:
            raise DataError(
                f"rollout {rollout_id} was sampled by the {sampler}, and "
                f"objective.kind={vars(objective)['kind']} does not learn from that: "
                f"{objective.refusal}"
            )


def weighted_mean(micro: MicroBatch, values_N: Tensor, denominator: float) -> Tensor:
    """Return sum_t w_i v_t / denominator: the micro-batch's share of the step's mean."""
    return (micro.importance_weight_N * values_N).sum() / denominator


def mean_metric(key: str, values_N: Tensor) -> TensorMetric:
    return TensorMetric(key, values_N.detach().sum(), values_N.numel(), Reduction.MEAN)


def max_metric(key: str, values_N: Tensor) -> TensorMetric:
    return TensorMetric(key, values_N.detach().max(), 1, Reduction.MAX)


def common_metrics(micro: MicroBatch, logprob_N: Tensor, entropy_N: Tensor) -> list[TensorMetric]:
    """Return the metrics of the sampled tokens that every objective reports.

    What compares with the model that sampled counts that model's tokens only: the reverse KL and
    the engine's logprobs the student's, the forward KL and the likelihood the teacher's.
    """
    logprob_N = logprob_N.detach()
    metrics = [mean_metric("loss/entropy_nats", entropy_N)]
    students = _of_sampler(micro, by_teacher=False)
    if students.count:
        gap_N = students.only((logprob_N - micro.behavior_logprob_N).abs())
        mean, longest = "health/learner_vs_engine_abs_nats", "health/learner_vs_engine_max_nats"
        metrics += [students.mean(mean, gap_N), max_metric(longest, gap_N)]
        if micro.is_scored:
            kl_N = students.only(logprob_N - micro.teacher_logprob_N)
            metrics.insert(0, students.mean("loss/reverse_kl_nats", kl_N))
    teachers = _of_sampler(micro, by_teacher=True)
    if teachers.count:
        nll_N = teachers.only(-logprob_N)
        metrics.append(teachers.mean("loss/teacher_answer_nll_nats", nll_N))
        if micro.is_scored:
            kl_N = teachers.only(micro.teacher_logprob_N - logprob_N)
            metrics.append(teachers.mean("loss/forward_kl_nats", kl_N))
    return metrics


@dataclass(frozen=True)
class _SamplersTokens:
    """The loss tokens that one of the models sampled."""

    mask_N: Tensor | None
    """None: all of them, or none."""
    count: int

    def only(self, values_N: Tensor) -> Tensor:
        """Return the values with 0 at the other tokens, where they may be NaN."""
        return values_N if self.mask_N is None else values_N.where(self.mask_N, 0.0)

    def mean(self, key: str, only_N: Tensor) -> TensorMetric:
        return TensorMetric(key, only_N.detach().sum(), self.count, Reduction.MEAN)


def _of_sampler(micro: MicroBatch, *, by_teacher: bool) -> _SamplersTokens:
    is_chosen = [flag == by_teacher for flag in micro.by_teacher]
    count = sum(n for n, chosen in zip(micro.loss_tokens, is_chosen, strict=True) if chosen)
    if all(is_chosen) or not any(is_chosen):
        return _SamplersTokens(None, count)
    mask_N = torch.from_numpy(np.repeat(is_chosen, micro.loss_tokens))
    return _SamplersTokens(to_device(mask_N, micro.target_N.device), count)


def require_top_k(micro: MicroBatch, k: int) -> TopKMicroBatch:
    """Return ``micro`` with its candidates; raise AlignmentError unless every token has k."""
    if not isinstance(micro, TopKMicroBatch) or micro.candidate_id_NK.shape[-1] != k:
        raise AlignmentError(f"this objective needs the teacher's top {k} at every position")
    return micro


def require_hidden(micro: MicroBatch) -> HiddenMicroBatch:
    """Return ``micro`` with the teacher's hidden states; raise AlignmentError without them."""
    if not isinstance(micro, HiddenMicroBatch):
        raise AlignmentError("this objective needs the teacher's hidden states at every position")
    return micro
