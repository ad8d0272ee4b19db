"""How the student learns: tuned weights, optimizer, schedule, replay."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator
from typing_extensions import Self

from qwen3_distill.config.base import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Schema,
)


class FullTuning(Schema):
    """Every weight of the student is trained."""

    kind: Literal["full"]


class LoraTuning(Schema):
    """Low-rank adapters (peft) on the named linear layers."""

    kind: Literal["lora"]
    rank: Annotated[int, Field(ge=1, le=1024)] = 32
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


TuningConfig: TypeAlias = Annotated[FullTuning | LoraTuning, Field(discriminator="kind")]


class ConstantSchedule(Schema):
    """Constant learning rate."""

    kind: Literal["constant"]


class WarmupCosineSchedule(Schema):
    """Linear warm-up, then a cosine decay to `final_fraction` of the peak at the last step."""

    kind: Literal["warmup_cosine"]
    warmup_steps: NonNegativeInt = 0
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1


ScheduleConfig: TypeAlias = Annotated[
    ConstantSchedule | WarmupCosineSchedule, Field(discriminator="kind")
]


class OptimizerConfig(Schema):
    """AdamW."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0e-5
    betas: tuple[
        Annotated[float, Field(ge=0, lt=1)],
        Annotated[float, Field(ge=0, lt=1)],
    ] = (0.9, 0.98)
    eps: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    schedule: ScheduleConfig = Field(default_factory=lambda: ConstantSchedule(kind="constant"))


class UniformLaw(Schema):
    """Draws every rollout that is young enough with the same probability."""

    kind: Literal["uniform"]


class _PriorityLaw(Schema):
    age_decay_steps: PositiveFloat | None = None
    """tau: a rollout's priority is multiplied by exp(-age / tau), with its age in optimizer steps;
    null: age does not matter."""
    uniform_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the probability that is spread evenly over all rollouts."""


class ProportionalLaw(_PriorityLaw):
    """Draws rollouts in proportion to priority^alpha (arXiv 1511.05952)."""

    kind: Literal["proportional"]
    alpha: Annotated[float, Field(gt=0, le=2)] = 0.6


class RankLaw(_PriorityLaw):
    """Draws rollouts in proportion to rank^-alpha, rank 1 for the largest priority
    (arXiv 1511.05952)."""

    kind: Literal["rank"]
    alpha: Annotated[float, Field(gt=0, le=2)] = 0.7


ReplayLaw: TypeAlias = Annotated[
    UniformLaw | ProportionalLaw | RankLaw, Field(discriminator="kind")
]
MIN_PRIORITY_NATS = 1e-3
"""Lower bound of a priority, so that a rollout with nothing left to teach can still be drawn."""


class ReplayConfig(Schema):
    """A buffer of scored rollouts on the learner's device, which are trained on again."""

    capacity_tokens: Annotated[int, Field(ge=1, le=10**15)]
    """Maximum prompt and response tokens in the buffer; 12 bytes each, and 8 more per candidate of
    the teacher. When it is full, the oldest rollouts are removed."""
    capacity_rollouts: PositiveInt | None = None
    """Maximum rollouts in the buffer; null: one per 32 tokens, so that the tokens decide."""
    max_age_steps: NonNegativeInt = 4
    """Maximum age in optimizer steps of a rollout's oldest token; an older rollout is dropped."""
    law: ReplayLaw = Field(default_factory=lambda: UniformLaw(kind="uniform"))
    """How rollouts are drawn."""
    updates_per_batch: PositiveInt = 1
    """Optimizer steps per batch of fresh rollouts."""
    reuse_cap: PositiveInt | None = None
    """A rollout is dropped after it was trained on this many times; null: only age limits it."""
    coverage_first: bool = False
    """Draw rollouts that were never trained on before all others."""
    priority_clip_nats: PositiveFloat = 2.0
    """Upper bound of a priority. A rollout's priority is the mean over its tokens of the
    advantage's absolute value, or of the divergence."""
    beta_start: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Exponent of the importance weight (1 / (N P))^beta at step 0. 0: no correction; 1: the
    expected gradient is that of uniform drawing. The uniform law ignores it."""
    beta_end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Exponent from step `beta_steps` on."""
    beta_steps: PositiveInt = 500
    """Steps over which the exponent moves linearly from `beta_start` to `beta_end`."""

    @model_validator(mode="after")
    def _priority_clip_exceeds_minimum(self) -> Self:
        if self.priority_clip_nats <= MIN_PRIORITY_NATS:
            raise ValueError(
                f"priority_clip_nats={self.priority_clip_nats}: expected more than the minimum "
                f"priority of {MIN_PRIORITY_NATS}, or all rollouts have the same priority"
            )
        return self

    @model_validator(mode="after")
    def _reuse_and_age_cover_updates(self) -> Self:
        if self.reuse_cap is not None and self.reuse_cap < self.updates_per_batch:
            raise ValueError(
                f"reuse_cap={self.reuse_cap} with updates_per_batch={self.updates_per_batch}: "
                "rollouts would be used up before the next batch arrives; raise reuse_cap or lower "
                "updates_per_batch"
            )
        if self.max_age_steps < self.updates_per_batch - 1:
            raise ValueError(
                f"max_age_steps={self.max_age_steps} with updates_per_batch="
                f"{self.updates_per_batch}: a batch would be too old before its last update; "
                "raise max_age_steps or lower updates_per_batch"
            )
        return self
