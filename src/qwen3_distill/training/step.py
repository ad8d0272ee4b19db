"""The records of one optimizer step: the work that it is given, and the gradient that it finds."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from qwen3_distill.training.batching import MicroBatch
from qwen3_distill.training.objectives.base import TensorMetric
from qwen3_distill.training.pass_counts import PassCounts
from qwen3_distill.types import Metric


class MicroBatches(Protocol):
    """Splits a step's rollouts; see `micro_batches`."""

    def __call__(self, max_tokens: int, *, packed: bool) -> Iterator[MicroBatch]: ...


@dataclass(frozen=True, kw_only=True)
class Step:
    """The rollouts of one optimizer step."""

    micros: MicroBatches
    denominator: float
    """sum_i w_i n_i over the whole step: every micro-batch divides by this."""
    num_loss_tokens: int
    lag_steps: int
    """Age of the oldest token."""


@dataclass(frozen=True, kw_only=True)
class Passed:
    """Results of the passes of a step's micro-batches, still on the device."""

    counts: PassCounts
    losses: list[Tensor] = field(default_factory=list)
    metrics: list[TensorMetric] = field(default_factory=list)
    rollouts: list[int] = field(default_factory=list)
    magnitudes: list[Tensor] = field(default_factory=list)
    """Each micro-batch's mean magnitudes of its rollouts' tokens, in the order of `rollouts`."""


@dataclass(frozen=True, kw_only=True)
class StepGradient:
    """Numbers of a step's accumulated gradient; the gradient itself is in the parameters."""

    loss: float
    norm: float
    metrics: list[Metric]
    magnitude_S: Tensor
    """[S] mean magnitude of each rollout's tokens, on the device."""


def no_micro_batches(max_tokens: int, *, packed: bool) -> Iterator[MicroBatch]:
    """Split the work of a rank that has no rollout in a step."""
    del max_tokens, packed
    return iter(())
