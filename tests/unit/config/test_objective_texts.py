"""Errors name the settings of the objective that the config has, today's to the letter."""

from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError

from qwen3_distill.config import ObjectiveSchema, RunConfig, SampledReverseKL
from qwen3_distill.errors import ConfigError
from qwen3_distill.pipeline.sampler_check import require_ratio_off_policy
from tests.unit.config.test_rules import GOOD

VLLM = {"kind": "vllm", "quantization": "fp8"}
STREAMING = {"kind": "streaming", "prefix": {"tokens": 4}}
BIASED = "and without the ratio the gradient is biased; set"
CREDIT = "a token's ratio does not correct the tokens after it"

WITHOUT_RATIO: list[tuple[dict[str, Any], str]] = [
    (
        {"sampling": {"temperature": 0.5}},
        "objective.{off} with sampling.temperature=0.5: tokens are sampled from another "
        f"distribution than the one whose KL is minimised, {BIASED} {{key}} or temperature=1",
    ),
    (
        {"generation": VLLM},
        "generation.quantization=fp8 with objective.{off}: tokens are sampled from a quantized "
        f"student, {BIASED} {{key}} or quantization=null",
    ),
    (
        {"generation": {"kind": "vllm", "kv_cache_dtype": "fp8"}},
        "generation.kv_cache_dtype=fp8 with objective.{off}: tokens are sampled from a quantized "
        f"student, {BIASED} {{key}} or kv_cache_dtype=auto",
    ),
    (
        {"replay": {"capacity_tokens": 40}},
        "replay with objective.{off}: replayed tokens were sampled from older weights, "
        f"{BIASED} {{key}}",
    ),
]
WITH_REWARD: list[tuple[dict[str, Any], str]] = [
    (
        {"sampling": {"temperature": 0.5}},
        f"sampling.temperature=0.5 with {{credit}}: {CREDIT}, so their share of its advantage is "
        "biased; use temperature=1, or {remedy}",
    ),
    ({"verifier": None}, "objective.{reward} needs a `verifier` section"),
    (
        {"samples_per_prompt": 1},
        "objective.{reward} with samples_per_prompt=1: the reward is centred within a prompt's "
        "samples, so with one sample it is always 0; use 2 or more",
    ),
    (
        {"pipeline": STREAMING},
        "pipeline.prefix with objective.{credit}: a piece of an answer does not know what comes "
        "after it; use {remedy}, or whole rollouts",
    ),
    (
        {"replay": {"capacity_tokens": 40}},
        f"replay with objective.{{credit}}: {CREDIT}, which older weights sampled, so their share "
        "of its advantage is biased; use {remedy}, or no replay",
    ),
]


class Praised(ObjectiveSchema):
    """An objective with settings of its own."""

    implementation: ClassVar[str] = "none"
    needs_ratio: ClassVar[bool] = True
    kind: Literal["praised"]
    weigh: Literal["ratio", "no"] = "ratio"
    praise: float = 0.0

    @property
    def uses_ratio(self) -> bool:
        return self.weigh == "ratio"

    @property
    def ratio_setting(self) -> str:
        return "weigh=no"

    @property
    def credits_later_tokens(self) -> bool:
        return self.praise > 0

    @property
    def credit_settings(self) -> str:
        return f"praise={self.praise}"

    @property
    def credit_remedy(self) -> str:
        return "praise=0"

    @property
    def reward_weight(self) -> float:
        return self.praise

    @property
    def reward_setting(self) -> str:
        return "praise > 0"


class Silent(ObjectiveSchema):
    """An objective that needs the ratio, has none, and names nothing."""

    implementation: ClassVar[str] = "none"
    needs_ratio: ClassVar[bool] = True
    kind: Literal["silent"]
    weight: float = 0.0

    @property
    def credits_later_tokens(self) -> bool:
        return self.weight > 0

    @property
    def reward_weight(self) -> float:
        return self.weight


class Config(RunConfig):
    objective: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
        SampledReverseKL | Praised | Silent, Field(discriminator="kind")
    ]


TODAY = {"off": "ratio_cap=null", "key": "ratio_cap", "reward": "task_reward_weight > 0"}
TODAY |= {"credit": "discount=0.0, task_reward_weight=1.0"}
TODAY |= {"remedy": "discount=0 and no task reward"}
OWN = {"off": "weigh=no", "key": "weigh", "reward": "praise > 0"}
OWN |= {"credit": "praise=1.0", "remedy": "praise=0"}
NAMELESS = dict.fromkeys(("off", "credit", "reward"), "kind=silent")
NAMELESS |= {"key": "kind", "remedy": "another objective.kind"}
OBJECTIVES: list[tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = [
    (
        {"kind": "sampled_reverse_kl", "ratio_cap": None},
        {"kind": "sampled_reverse_kl", "task_reward_weight": 1.0},
        TODAY,
    ),
    ({"kind": "praised", "weigh": "no"}, {"kind": "praised", "praise": 1.0}, OWN),
]


def error_of(objective: dict[str, Any], change: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(GOOD | {"replay": None, "objective": objective} | change)
    (error,) = caught.value.errors()
    return error["msg"].removeprefix("Value error, ")


@pytest.mark.parametrize(("without", "_", "names"), OBJECTIVES, ids=("today", "own"))
@pytest.mark.parametrize(("change", "text"), WITHOUT_RATIO)
def test_errors_name_the_setting_of_the_ratio(
    change: dict[str, Any], text: str, without: dict[str, Any], _: Any, names: dict[str, str]
) -> None:
    assert error_of(without, change) == text.format(**names)


@pytest.mark.parametrize(("_", "rewarded", "names"), OBJECTIVES, ids=("today", "own"))
@pytest.mark.parametrize(("change", "text"), WITH_REWARD)
def test_errors_name_the_settings_of_the_reward(
    change: dict[str, Any], text: str, _: Any, rewarded: dict[str, Any], names: dict[str, str]
) -> None:
    assert error_of(rewarded, change) == text.format(**names)


@pytest.mark.parametrize(("change", "text"), WITHOUT_RATIO)
def test_an_objective_that_names_nothing_is_named_by_its_kind(
    change: dict[str, Any], text: str
) -> None:
    assert error_of({"kind": "silent"}, change) == text.format(**NAMELESS)


def test_an_objective_that_names_no_reward_is_named_by_its_kind() -> None:
    rewarded = {"kind": "silent", "weight": 1.0}
    text = "objective.kind=silent needs a `verifier` section"
    assert error_of(rewarded, {"verifier": None}) == text
    assert "pipeline.prefix with objective.kind=silent: a piece of an answer" in error_of(
        rewarded, {"pipeline": STREAMING}
    )


@pytest.mark.parametrize(("without", "_", "names"), OBJECTIVES, ids=("today", "own"))
def test_off_policy_names_the_setting_of_the_ratio(
    without: dict[str, Any], _: Any, names: dict[str, str]
) -> None:
    config = Config.model_validate(GOOD | {"replay": None, "objective": without})
    with pytest.raises(ConfigError) as caught:
        require_ratio_off_policy(config)
    assert str(caught.value) == (
        "--off-policy with objective.{off}: tokens that another model sampled give a biased "
        "gradient without the importance ratio; set objective.{key}".format(**names)
    )
