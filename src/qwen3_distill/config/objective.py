"""The objectives: their settings, and what each needs from the rest of the run.

A new objective is one member of `ObjectiveConfig` here and one file in ``training/objectives``.
What it needs, it states in the properties of `ObjectiveSchema`; no other code asks for its kind.
docs/extend/your-own-loss.md has a worked example.
"""

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator
from typing_extensions import Self

from qwen3_distill.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Schema
from qwen3_distill.config.rollouts import SampledBy
from qwen3_distill.types import (
    GivenCandidatesRequest,
    HiddenRequest,
    SampledRequest,
    ScoreRequest,
    TopKRequest,
)

RewardScale: TypeAlias = Literal["none", "std"]
"""``std``: the standard deviation of the rewards of a prompt's samples."""


class ObjectiveSchema(Schema):
    """Base of all objectives: what an objective states about itself."""

    implementation: ClassVar[str]
    """``module:Class`` that computes the loss; `build_objective` imports it."""
    needs_ratio: ClassVar[bool] = False
    """Whether the gradient is an expectation over the sampled tokens. It is then biased when they
    were sampled from another distribution than the current student's, unless the loss weighs them
    by the importance ratio pi / mu (`uses_ratio`)."""
    learns_from: ClassVar[frozenset[SampledBy]] = frozenset({"student"})
    """Whose samples give the right gradient. A rollout that another model sampled is refused."""
    refusal: ClassVar[str] = (
        "its gradient is an expectation over the student's own samples, and the teacher's answers "
        "are none; use rollouts.source=student, or objective.kind=top_k, full or sft"
    )
    """Why other samples than those of `learns_from` are refused, and what to use, for errors."""

    @property
    def uses_ratio(self) -> bool:
        """Whether the loss weighs sampled tokens by the importance ratio pi / mu."""
        return False

    @property
    def ratio_setting(self) -> str:
        """The setting that leaves the ratio out, as ``key=value`` for errors."""
        return self._own_kind

    @property
    def ratio_key(self) -> str:
        """The key of `ratio_setting`."""
        return self.ratio_setting.partition("=")[0]

    @property
    def lacks_ratio(self) -> bool:
        """Whether tokens of another distribution than the student's would bias the gradient."""
        return self.needs_ratio and not self.uses_ratio

    @property
    def credits_later_tokens(self) -> bool:
        """Whether a token's loss depends on later tokens. Its own ratio does not correct for them,
        and a harvested piece lacks them."""
        return False

    @property
    def credit_settings(self) -> str:
        """The settings behind `credits_later_tokens`, as ``key=value, key=value`` for errors."""
        return self._own_kind

    @property
    def credit_remedy(self) -> str:
        """Settings that credit no later tokens, for errors that say "use ..."."""
        return "another objective.kind"

    @property
    def reward_weight(self) -> float:
        """Weight of the verifier's reward; 0: rollouts are trained on without a verdict."""
        return 0.0

    @property
    def reward_setting(self) -> str:
        """The setting behind `reward_weight`, as ``key > 0`` or ``key=value`` for errors."""
        return self._own_kind

    @property
    def group_scale(self) -> RewardScale:
        """Divisor of a prompt's centred rewards."""
        return "none"

    @property
    def score_request(self) -> ScoreRequest | None:
        """The least that the teacher must return for this objective; None: no score is needed."""
        return SampledRequest()

    @property
    def student_candidates(self) -> int:
        """K: the student's most likely tokens to keep at every token that it samples; 0: none."""
        request = self.score_request
        return request.k if isinstance(request, GivenCandidatesRequest) else 0

    @property
    def _own_kind(self) -> str:
        return f"kind={vars(self)['kind']}"  # every objective has the field


class NoBaseline(Schema):
    """b = 0."""

    kind: Literal["none"]

    @property
    def score_request(self) -> ScoreRequest:
        return SampledRequest()


class TopKBaseline(Schema):
    """b = KL(student || teacher) over the teacher's k most likely tokens and one tail outcome."""

    kind: Literal["top_k"]
    k: PositiveInt = 16

    @property
    def score_request(self) -> ScoreRequest:
        return TopKRequest(k=self.k)


class FullBaseline(Schema):
    """b = KL(student || teacher), exact, from the teacher's hidden states."""

    kind: Literal["full"]

    @property
    def score_request(self) -> ScoreRequest:
        return HiddenRequest()


BaselineConfig: TypeAlias = Annotated[
    NoBaseline | TopKBaseline | FullBaseline, Field(discriminator="kind")
]


class SampledReverseKL(ObjectiveSchema):
    """Policy gradient of KL(student || teacher) on the sampled tokens."""

    implementation: ClassVar[str] = "qwen3_distill.training.objectives.sampled:SampledObjective"
    needs_ratio: ClassVar[bool] = True

    kind: Literal["sampled_reverse_kl"]
    ratio_cap: PositiveFloat | None = 2.0
    """Cap c of the importance ratio min(pi/mu, c); null: no ratio (mu is taken for pi)."""
    advantage_clip: PositiveFloat | None = 5.0
    """Clip a of the advantage to [-a, a] nats; null: no clip."""
    kl_baseline: BaselineConfig = Field(default_factory=lambda: NoBaseline(kind="none"))
    """Per-token baseline b. It lowers the variance of the gradient and does not change its
    expectation, except where an advantage is clipped."""
    discount: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight per step of later tokens' signals in a token's advantage. 0: none."""
    task_reward_weight: NonNegativeFloat = 0.0
    """Weight of the verifier's group-centred reward, added to every token's advantage."""

    @property
    def uses_ratio(self) -> bool:
        return self.ratio_cap is not None

    @property
    def ratio_setting(self) -> str:
        return "ratio_cap=null"

    @property
    def credits_later_tokens(self) -> bool:
        return self.discount > 0 or self.task_reward_weight > 0

    @property
    def credit_settings(self) -> str:
        return f"discount={self.discount}, task_reward_weight={self.task_reward_weight}"

    @property
    def credit_remedy(self) -> str:
        return "discount=0 and no task reward"

    @property
    def reward_weight(self) -> float:
        return self.task_reward_weight

    @property
    def reward_setting(self) -> str:
        return "task_reward_weight > 0"

    @property
    def score_request(self) -> ScoreRequest:
        return self.kl_baseline.score_request

    @model_validator(mode="after")
    def _discount_excludes_kl_baseline(self) -> Self:
        if self.discount > 0 and self.kl_baseline.kind != "none":
            raise ValueError(
                f"discount={self.discount} with kl_baseline.kind={self.kl_baseline.kind}: the "
                "baselines of later tokens depend on this token's action and cancel what the "
                "discount adds; use kl_baseline.kind=none or discount=0"
            )
        return self


class _Divergence(ObjectiveSchema):
    learns_from: ClassVar[frozenset[SampledBy]] = frozenset({"student", "teacher"})

    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """``reverse_kl``: KL(student || teacher); ``forward_kl``: KL(teacher || student); ``jsd``:
    the mixture M = beta teacher + (1 - beta) student, beta KL(teacher || M) + (1 - beta)
    KL(student || M)."""
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Weight of the teacher in the mixture; required by ``jsd``, refused otherwise."""

    @model_validator(mode="after")
    def _beta_belongs_to_jsd(self) -> Self:
        if (self.beta is None) == (self.divergence == "jsd"):
            raise ValueError(
                f"divergence={self.divergence} with beta={self.beta}: "
                "set beta (e.g. 0.5) with divergence=jsd and only with it"
            )
        return self


class TopKDivergence(_Divergence):
    """A divergence over the k most likely tokens of one model at every position."""

    implementation: ClassVar[str] = "qwen3_distill.training.objectives.divergences:TopKObjective"

    kind: Literal["top_k"]
    k: PositiveInt = 16
    support: Literal["teacher", "student"] = "teacher"
    """Whose k most likely tokens are compared. ``student``: those that it had when it sampled the
    token, kept with the rollout; only embedded teachers score given tokens."""
    tail: Literal["renormalize", "bin"] = "bin"
    """``bin``: one more outcome holds the remaining mass of both; ``renormalize``: both are
    divided by their mass on the k."""

    @property
    def score_request(self) -> ScoreRequest:
        if self.support == "student":
            return GivenCandidatesRequest(k=self.k)
        return TopKRequest(k=self.k)

    @model_validator(mode="after")
    def _k_1_excludes_renormalize(self) -> Self:
        if self.k == 1 and self.tail == "renormalize":
            raise ValueError(
                "k=1 with tail=renormalize: both distributions become 1 on the one token, so the "
                "gradient is zero everywhere; use tail=bin or k >= 2"
            )
        return self


class FullDivergence(_Divergence):
    """A divergence over the whole vocabulary, from the teacher's hidden states."""

    implementation: ClassVar[str] = "qwen3_distill.training.objectives.divergences:FullObjective"

    kind: Literal["full"]

    @property
    def score_request(self) -> ScoreRequest:
        return HiddenRequest()


class CrossEntropy(ObjectiveSchema):
    """Supervised fine-tuning: cross-entropy on the tokens that the teacher sampled."""

    implementation: ClassVar[str] = "qwen3_distill.training.objectives.sft:SftObjective"
    learns_from: ClassVar[frozenset[SampledBy]] = frozenset({"teacher"})
    refusal: ClassVar[str] = (
        "cross-entropy on the student's own samples has an expected gradient of zero, so it "
        "teaches nothing; use rollouts.source=teacher or a file of the teacher's answers, or "
        "objective.kind=top_k or full, which learn from both"
    )

    kind: Literal["sft"]

    @property
    def score_request(self) -> ScoreRequest | None:
        return None


class GroupRelativePolicy(ObjectiveSchema):
    """Policy gradient of the verifier's reward, relative to the other samples of a prompt (GRPO,
    arXiv 2402.03300), without a teacher."""

    implementation: ClassVar[str] = "qwen3_distill.training.objectives.grpo:GrpoObjective"
    needs_ratio: ClassVar[bool] = True
    refusal: ClassVar[str] = (
        "its gradient is an expectation over the student's own samples, and the teacher's answers "
        "are none; use rollouts.source=student, or objective.kind=sft on the teacher's answers"
    )

    kind: Literal["grpo"]
    clip: Annotated[float, Field(gt=0, lt=1)] | None = 0.2
    """epsilon: the ratio pi/mu counts between 1 - epsilon and 1 + epsilon (PPO, arXiv 1707.06347);
    null: no ratio (mu is taken for pi)."""
    clip_high: Annotated[float, Field(gt=0, le=100)] | None = None
    """epsilon above 1, if it is another one (DAPO, arXiv 2503.14476); null: `clip`."""
    reward_scale: RewardScale = "none"
    """Divisor of a prompt's centred rewards. ``std``: their standard deviation (arXiv 2402.03300);
    ``none``: 1, because a standard deviation favours prompts that are nearly always or nearly never
    solved (Dr. GRPO, arXiv 2503.20783)."""

    @property
    def uses_ratio(self) -> bool:
        return self.clip is not None

    @property
    def ratio_setting(self) -> str:
        return "clip=null"

    @property
    def credits_later_tokens(self) -> bool:
        return True

    @property
    def reward_weight(self) -> float:
        return 1.0

    @property
    def group_scale(self) -> RewardScale:
        return self.reward_scale

    @property
    def score_request(self) -> ScoreRequest | None:
        return None

    @model_validator(mode="after")
    def _clip_high_needs_clip(self) -> Self:
        if self.clip is None and self.clip_high is not None:
            raise ValueError(
                f"clip_high={self.clip_high} with clip=null: without a ratio nothing is clipped; "
                "set clip, or drop clip_high"
            )
        return self


ObjectiveConfig: TypeAlias = Annotated[
    SampledReverseKL | TopKDivergence | FullDivergence | CrossEntropy | GroupRelativePolicy,
    Field(discriminator="kind"),
]


def needs_hidden_states(objective: ObjectiveSchema) -> bool:
    """Whether the objective compares with the teacher's full distribution."""
    return isinstance(objective.score_request, HiddenRequest)


def candidates_per_token(objective: ObjectiveSchema) -> int:
    """K: the number of candidates whose logprobs come with every score; 0 for none."""
    request = objective.score_request
    return request.k if isinstance(request, TopKRequest | GivenCandidatesRequest) else 0
