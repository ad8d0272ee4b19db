"""Parts of `staleness.py` that the package does not offer: an exact lag and biased objectives.

Shape letters: B rows of a micro-batch, T positions, N its loss tokens, D hidden size,
V vocabulary.
"""

from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from qwen3_distill.config import EmbeddedTraining, SampledReverseKL
from qwen3_distill.errors import WeightVersionError
from qwen3_distill.modeling.head import token_stats
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.ports import (
    Reach,
    RolloutEngine,
    WeightChannel,
    WeightPayload,
)
from qwen3_distill.training.batching import MicroBatch
from qwen3_distill.training.embedded.student import EmbeddedLearner
from qwen3_distill.training.objectives.base import LossTerms, TensorMetric
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.types import Reduction, Rollout, RolloutRequest, WeightVersion
from qwen3_distill.weights.adapter_files import write_adapter

Advantage: TypeAlias = Literal["old", "current"]
"""``old``: log q - log mu, of the student that sampled; ``current``: log q - log pi_theta."""
Ratio: TypeAlias = Literal["none", "truncated", "ppo_clip"]
"""``none``: 1; ``truncated``: min(pi_theta / mu, cap); ``ppo_clip``: pi_theta / mu, and no
gradient where it has left [1 - clip, 1 + clip] in the direction that the advantage pushes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the staleness table."""

    staleness: int
    advantage: Advantage
    ratio: Ratio

    @property
    def name(self) -> str:
        return f"staleness_{self.staleness}_{self.advantage}_{self.ratio}"


def adapted(parts: Parts, case: Case) -> Parts:
    """The parts with the case's lag and objective."""
    training, objective = parts.config.training, parts.config.objective
    assert isinstance(training, EmbeddedTraining)
    assert isinstance(objective, SampledReverseKL)
    assert objective.advantage_clip is not None
    assert objective.ratio_cap is not None
    settings = LearnerSettings(
        model_dir=Path(parts.config.student.model),
        training=training,
        objective=objective,
        total_steps=parts.config.steps,
        seed=parts.config.seed,
    )
    learner = EmbeddedLearner(
        settings,
        StaleObjective(
            advantage=case.advantage,
            ratio=case.ratio,
            ratio_cap=objective.ratio_cap,
            advantage_clip=objective.advantage_clip,
            chunk_tokens=training.chunk_tokens,
        ),
    )
    return replace(parts, learner=learner, engine=LaggedEngine(parts.engine, case.staleness))


class LaggedEngine:
    """A `RolloutEngine` that serves the weights of ``lag_steps`` versions ago.

    If a version is loaded at every step, the rollouts of step s come from the weights of step
    max(0, s - lag_steps). The inner engine loads that version, so rollouts record it.
    """

    def __init__(self, inner: RolloutEngine, lag_steps: int) -> None:
        self.inner = inner
        self._published: deque[tuple[WeightVersion, WeightPayload]] = deque(maxlen=lag_steps + 1)

    async def start(self) -> None:
        await self.inner.start()

    @property
    def counters(self) -> Mapping[str, float]:
        return self.inner.counters

    @property
    def version(self) -> WeightVersion:
        return self.inner.version

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        # A channel in memory returns a copy, which no later version overwrites.
        self._published.append((version, channel.fetch(version)))
        oldest, payload = self._published[0]
        await self.inner.load(oldest, _OneVersion(oldest, payload))

    def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        return self.inner.generate(requests)

    async def close(self) -> None:
        await self.inner.close()


@dataclass(frozen=True)
class _OneVersion:
    """A `WeightChannel` that holds one version."""

    held: WeightVersion
    payload: WeightPayload
    reach: Reach = "process"

    def publish(self, version: WeightVersion, payload: WeightPayload) -> None:
        raise NotImplementedError("nothing is published to a lagged engine's own channel")

    def fetch(self, version: WeightVersion) -> WeightPayload:
        if version != self.held:
            raise WeightVersionError(f"this channel holds {self.held}, not {version}")
        return self.payload

    def adapter_directory(self, version: WeightVersion, folder: Path) -> Path:
        return write_adapter(version, self.fetch(version), folder)

    def switched_transport(self, version: WeightVersion) -> bool:
        return False


class StaleTerms(NamedTuple):
    """A loss and the terms of its metrics; only ``loss`` has a gradient."""

    loss: Tensor
    """Scalar: this micro-batch's share of the step's loss."""
    ratio_N: Tensor
    """pi_theta / mu of the sampled tokens."""
    advantage_N: Tensor
    """A_t as used."""
    capped_N: Tensor
    """bool: the cap or the clip changed the token's gradient."""


def stale_surrogate(
    learner_logprob_N: Tensor,
    behavior_logprob_N: Tensor,
    teacher_logprob_N: Tensor,
    importance_weight_N: Tensor,
    *,
    advantage: Advantage,
    ratio: Ratio,
    denominator: float,
    ratio_cap: float,
    ppo_clip: float,
    advantage_clip: float,
) -> StaleTerms:
    """Compute the sampled-token surrogate with either advantage and one of three ratios.

        none, truncated   - sum_t w rho_t A_t log pi_theta(a_t) / denominator, rho_t detached
        ppo_clip          - sum_t w min(r_t A_t, clip(r_t, 1 - e, 1 + e) A_t) / denominator
                            (arXiv 1707.06347), r_t = pi_theta(a_t) / mu(a_t) with gradient

    The current advantage with no ratio or a truncated one is the package's `sampled_reverse_kl`,
    bit for bit. All others have another expected gradient than the KL when pi_theta is not mu.

    Args:
        learner_logprob_N: log pi_theta(a_t), with gradient.
        behavior_logprob_N: log mu(a_t).
        teacher_logprob_N: log q(a_t).
        importance_weight_N: w of the token's rollout.
        denominator: of the whole step.
    """
    learner_N = learner_logprob_N.detach()
    ratio_N = torch.exp(learner_N - behavior_logprob_N)
    student_N = learner_N if advantage == "current" else behavior_logprob_N
    advantage_N = (teacher_logprob_N - student_N).clamp(-advantage_clip, advantage_clip)
    if ratio == "ppo_clip":
        with_gradient_N = torch.exp(learner_logprob_N - behavior_logprob_N)
        clipped_N = with_gradient_N.clamp(1 - ppo_clip, 1 + ppo_clip)
        objective_N = torch.minimum(with_gradient_N * advantage_N, clipped_N * advantage_N)
        loss = -(importance_weight_N * objective_N).sum() / denominator
        too_far_N = torch.where(advantage_N > 0, ratio_N > 1 + ppo_clip, ratio_N < 1 - ppo_clip) & (
            advantage_N != 0
        )
        return StaleTerms(loss, ratio_N, advantage_N, too_far_N)
    truncated = ratio == "truncated"
    used_ratio_N = ratio_N.clamp(max=ratio_cap) if truncated else torch.ones_like(ratio_N)
    weighted_N = importance_weight_N * used_ratio_N * advantage_N
    loss = -(weighted_N * learner_logprob_N).sum() / denominator
    capped_N = ratio_N > ratio_cap if truncated else torch.zeros_like(ratio_N, dtype=torch.bool)
    return StaleTerms(loss, ratio_N, advantage_N, capped_N)


@dataclass(frozen=True, kw_only=True)
class StaleObjective:
    """The `Objective` whose loss is `stale_surrogate`."""

    advantage: Advantage
    ratio: Ratio
    ratio_cap: float = 2.0
    ppo_clip: float = 0.2
    advantage_clip: float
    chunk_tokens: int

    def terms(
        self, micro: MicroBatch, hidden_BTD: Tensor, head_VD: Tensor, denominator: float
    ) -> LossTerms:
        stats = token_stats(
            micro.at_loss_tokens(hidden_BTD),
            head_VD,
            micro.target_N,
            chunk_tokens=self.chunk_tokens,
        )
        terms = stale_surrogate(
            stats.logprob_N,
            micro.behavior_logprob_N,
            micro.teacher_logprob_N,
            micro.importance_weight_N,
            advantage=self.advantage,
            ratio=self.ratio,
            denominator=denominator,
            ratio_cap=self.ratio_cap,
            ppo_clip=self.ppo_clip,
            advantage_clip=self.advantage_clip,
        )
        learner_N = stats.logprob_N.detach()
        means = {
            "loss/reverse_kl_nats": learner_N - micro.teacher_logprob_N,
            "health/learner_vs_engine_abs_nats": (learner_N - micro.behavior_logprob_N).abs(),
            "health/ratio_capped_fraction": terms.capped_N.float(),
        }
        return LossTerms(
            terms.loss,
            tuple(
                TensorMetric(key, values_N.sum(), values_N.numel(), Reduction.MEAN)
                for key, values_N in means.items()
            ),
            magnitude_N=terms.advantage_N.abs(),
        )
