"""The objectives."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator
from typing_extensions import Self

from qwen3_distill.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Schema


class NoBaseline(Schema):
    """b = 0."""

    kind: Literal["none"]


class TopKBaseline(Schema):
    """b = KL(student || teacher) over the teacher's k most likely tokens and one tail outcome."""

    kind: Literal["top_k"]
    k: PositiveInt = 16


class FullBaseline(Schema):
    """b = KL(student || teacher), exact, from the teacher's hidden states."""

    kind: Literal["full"]


BaselineConfig: TypeAlias = Annotated[
    NoBaseline | TopKBaseline | FullBaseline, Field(discriminator="kind")
]


class SampledReverseKL(Schema):
    """Policy gradient of KL(student || teacher) on the sampled tokens."""

    kind: Literal["sampled_reverse_kl"]
    ratio_cap: PositiveFloat | None = 2.0
    """Cap c of the importance ratio min(pi/mu, c); null: no ratio (mu is taken for pi)."""
    advantage_clip: PositiveFloat | None = 5.0
    """Clip a of the advantage to [-a, a] nats; null: no clip."""
    kl_baseline: BaselineConfig = Field(default_factory=lambda: NoBaseline(kind="none"))
    """Per-token baseline b. Leaves the expected gradient as it is, where the clip does not bite,
    and lowers its variance."""
    discount: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of later tokens' signals in a token's advantage. 0: each token answers for itself."""
    task_reward_weight: NonNegativeFloat = 0.0
    """Weight of the verifier's group-centred reward, added to every token's advantage."""

    @model_validator(mode="after")
    def _a_baseline_cancels_discounted_signals(self) -> Self:
        if self.discount > 0 and self.kl_baseline.kind != "none":
            raise ValueError(
                f"discount={self.discount} with kl_baseline.kind={self.kl_baseline.kind}: the "
                "baselines of later tokens depend on this token's action and cancel what the "
                "discount adds; use kl_baseline.kind=none or discount=0"
            )
        return self


class _Divergence(Schema):
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """``reverse_kl``: KL(student || teacher); ``forward_kl``: KL(teacher || student); ``jsd``:
    the mixture M = beta teacher + (1 - beta) student, beta KL(teacher || M) + (1 - beta)
    KL(student || M)."""
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Weight of the teacher in the mixture; for ``jsd`` only, and needed by it."""

    @model_validator(mode="after")
    def _beta_belongs_to_jsd(self) -> Self:
        if (self.beta is None) == (self.divergence == "jsd"):
            raise ValueError(
                f"divergence={self.divergence} with beta={self.beta}: "
                "set beta (e.g. 0.5) with divergence=jsd and only with it"
            )
        return self


class TopKDivergence(_Divergence):
    """A divergence over the teacher's k most likely tokens at every position."""

    kind: Literal["top_k"]
    k: Annotated[int, Field(ge=1)] = 16
    tail: Literal["renormalize", "bin"] = "bin"
    """``bin``: one more outcome holds the rest of both; ``renormalize``: both are divided by
    their mass on the k."""

    @model_validator(mode="after")
    def _renormalized_top_1_has_no_gradient(self) -> Self:
        if self.k == 1 and self.tail == "renormalize":
            raise ValueError(
                "k=1 with tail=renormalize: both distributions become 1 on the one token, so the "
                "gradient is zero everywhere; use tail=bin or k >= 2"
            )
        return self


class FullDivergence(_Divergence):
    """A divergence over the whole vocabulary, from the teacher's hidden states."""

    kind: Literal["full"]


ObjectiveConfig: TypeAlias = Annotated[
    SampledReverseKL | TopKDivergence | FullDivergence, Field(discriminator="kind")
]


def needs_hidden_states(objective: ObjectiveConfig) -> bool:
    """Whether the teacher's full distribution is compared with."""
    return objective.kind == "full" or (
        objective.kind == "sampled_reverse_kl" and objective.kl_baseline.kind == "full"
    )


def candidates_per_token(objective: ObjectiveConfig) -> int:
    """K: how many of the teacher's most likely tokens every position has; 0 for none."""
    if objective.kind == "top_k":
        return objective.k
    if objective.kind == "sampled_reverse_kl" and objective.kl_baseline.kind == "top_k":
        return objective.kl_baseline.k
    return 0
