import asyncio
import math
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.config import SamplingConfig
from qwen3_distill.evaluation.accuracy import (
    Z_95,
    EvaluationResult,
    accuracy_interval,
    evaluate,
    reward_interval,
)
from qwen3_distill.ports import WeightChannel
from qwen3_distill.types import (
    FinishReason,
    Prompt,
    Rollout,
    RolloutRequest,
    VersionSpan,
    WeightVersion,
)
from tests.contract.builders import draws_after

# --- The interval -------------------------------------------------------------------------------


def outcomes(successes: int, trials: int) -> np.ndarray:
    return np.array([1.0] * successes + [0.0] * (trials - successes))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe 1998, table I (method 3): 81 of 263, 15 of 148, 0 of 20, 1 of 29
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_one_sample_per_problem_gives_the_wilson_interval(
    successes: int, trials: int, low: float, high: float
) -> None:
    interval = accuracy_interval(outcomes(successes, trials), 1)
    assert interval == pytest.approx((low, high), abs=6e-5)


def effective_trials(rates: np.ndarray, samples_per_problem: int) -> float:
    """The number of trials whose Wilson interval has the interval's width."""
    low, high = accuracy_interval(rates, samples_per_problem)
    mean = float(rates.mean())
    few, many = 1.0, 1e9
    for _ in range(200):
        middle = math.sqrt(few * many)
        spread = math.sqrt(mean * (1 - mean) / middle + Z_95**2 / (4 * middle**2))
        if 2 * Z_95 * spread / (1 + Z_95**2 / middle) > high - low:
            few = middle
        else:
            many = middle
    return few


def test_samples_that_always_agree_count_once_per_problem() -> None:
    assert effective_trials(outcomes(12, 40), 8) == pytest.approx(40, rel=0.03)


def test_problems_that_all_agree_at_a_half_count_every_sample() -> None:
    assert effective_trials(np.full(10, 0.5), 8) == pytest.approx(80, rel=0.03)


def test_independent_samples_count_each() -> None:
    rng = np.random.default_rng(0)
    rates = rng.binomial(8, 0.4, size=4000) / 8
    assert effective_trials(rates, 8) == pytest.approx(4000 * 8, rel=0.06)


def test_half_correlated_samples_count_in_between() -> None:
    rng = np.random.default_rng(0)
    rates = rng.binomial(8, rng.beta(2, 3, size=4000)) / 8
    # Variance of a beta-binomial rate: p (1 - p) (1 + 7 rho) / 8 with rho = 1 / (2 + 3 + 1).
    assert effective_trials(rates, 8) == pytest.approx(4000 * 8 / (1 + 7 / 6), rel=0.06)


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=30),
)
def test_the_interval_holds_the_mean_and_lies_between_its_bounds(counts: list[int]) -> None:
    rates = np.array(counts) / 4
    low, high = accuracy_interval(rates, 4)
    assert 0 <= low <= rates.mean() + 1e-12
    assert rates.mean() - 1e-12 <= high <= 1
    if 0 < rates.mean() < 1:
        trials = effective_trials(rates, 4)
        assert len(rates) * 0.999 <= trials <= 4 * len(rates) * 1.001


@given(
    rewards=st.lists(st.floats(0, 1), min_size=1, max_size=30),
)
@settings(max_examples=15, deadline=None)
def test_the_interval_of_rewards_holds_their_mean(rewards: list[float]) -> None:
    means = np.array(rewards)
    low, high = reward_interval(means)
    assert 0 <= low <= means.mean() + 1e-12
    assert means.mean() - 1e-12 <= high <= 1
    assert reward_interval(means) == (low, high), "the same numbers every time"


def test_the_interval_of_rewards_is_that_of_their_mean_s_spread() -> None:
    means = np.random.default_rng(0).uniform(0.2, 0.8, size=2000)
    low, high = reward_interval(means)
    half = Z_95 * means.std(ddof=1) / math.sqrt(2000)
    assert (low, high) == pytest.approx((means.mean() - half, means.mean() + half), abs=1e-3)


@pytest.mark.parametrize("means", [np.array([0.5]), np.full(40, 0.25)])
def test_equal_rewards_have_the_widest_interval(means: np.ndarray) -> None:
    assert reward_interval(means) == accuracy_interval(means, 1)


# --- evaluate() ---------------------------------------------------------------------------------

VERSION = WeightVersion(step=0, digest="fake")


class FakeScriptedEngine:
    """Answers every request by its sample number; yields them last first.

    Sample s is s + 1 tokens long; it is cut when s is odd, and its first token is the sample.
    """

    version = VERSION

    def __init__(self) -> None:
        self.requests: list[RolloutRequest] = []

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        raise AssertionError("an evaluation loads no weights")

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        self.requests.extend(requests)
        for request in reversed(requests):
            sample = int(request.rollout_id.rsplit("/", 1)[-1])
            size = sample + 1
            yield Rollout(
                rollout_id=request.rollout_id,
                prompt=request.prompt,
                sampling=request.sampling,
                response_ids=np.full(size, sample),
                behavior_logprobs=np.zeros(size),
                versions=(VersionSpan(start=0, stop=size, version=VERSION),),
                finish_reason=FinishReason.LENGTH if sample % 2 else FinishReason.STOP,
            )

    async def close(self) -> None:
        return None


def problems(count: int) -> list[Prompt]:
    return [
        Prompt(prompt_id=f"p:{i}", token_ids=np.array([1 + i]), task_data={"right": str(i)})
        for i in range(count)
    ]


def is_correct(rollout: Rollout) -> bool:
    """Problem i is solved by the samples below i."""
    return int(rollout.response_ids[0]) < int(rollout.prompt.task_data["right"])


def evaluated(
    engine: FakeScriptedEngine, *, count: int = 4, samples: int = 3, seed: int = 0
) -> EvaluationResult:
    return asyncio.run(
        evaluate(
            engine,
            problems(count),
            is_correct,
            sampling=SamplingConfig(temperature=0.6, top_p=0.9, top_k=20, max_new_tokens=9),
            samples_per_problem=samples,
            seed=seed,
        )
    )


def test_the_result_counts_problems_lengths_and_cuts() -> None:
    result = evaluated(FakeScriptedEngine())
    assert result.accuracy == pytest.approx((0 + 1 / 3 + 2 / 3 + 1) / 4)
    assert (result.num_problems, result.samples_per_problem) == (4, 3)
    assert result.mean_tokens == pytest.approx(2)
    assert result.truncated_fraction == pytest.approx(1 / 3)
    expected = accuracy_interval(np.array([0, 1 / 3, 2 / 3, 1]), 3)
    assert (result.ci_low, result.ci_high) == pytest.approx(expected)


def test_rewards_between_0_and_1_are_averaged_with_an_interval_of_their_own() -> None:
    result = asyncio.run(
        evaluate(
            FakeScriptedEngine(),
            problems(4),
            lambda rollout: int(rollout.prompt.task_data["right"]) / 4,
            sampling=SamplingConfig(),
            samples_per_problem=2,
            seed=0,
        )
    )
    assert result.accuracy == pytest.approx((0 + 1 + 2 + 3) / 16)
    expected = reward_interval(np.array([0, 0.25, 0.5, 0.75]))
    assert (result.ci_low, result.ci_high) == pytest.approx(expected)
    assert expected != pytest.approx(accuracy_interval(np.array([0, 0.25, 0.5, 0.75]), 2))


def test_every_sample_is_requested_once_with_the_given_sampling() -> None:
    engine = FakeScriptedEngine()
    evaluated(engine)
    assert len({request.rollout_id for request in engine.requests}) == 12
    assert len({request.sampling.seed for request in engine.requests}) == 12
    prompts = [request.prompt.prompt_id for request in engine.requests]
    assert prompts == sorted(prompts)  # a prompt's samples are adjacent
    specs = {
        (s.temperature, s.top_p, s.top_k, s.max_new_tokens)
        for s in (request.sampling for request in engine.requests)
    }
    assert specs == {(0.6, 0.9, 20, 9)}


def seeds_by_rollout(**settings: int) -> dict[str, int]:
    engine = FakeScriptedEngine()
    evaluated(engine, **settings)
    return {request.rollout_id: request.sampling.seed for request in engine.requests}


def test_seeds_belong_to_the_problem_and_not_to_its_position() -> None:
    few, many = seeds_by_rollout(count=2, samples=2), seeds_by_rollout(count=4, samples=3)
    assert few.items() <= many.items()
    assert not set(few.values()) & set(seeds_by_rollout(count=2, samples=2, seed=1).values())


def test_an_evaluation_leaves_global_random_state_alone() -> None:
    evaluating = draws_after(lambda: evaluated(FakeScriptedEngine()))
    assert evaluating == draws_after(lambda: None)


def test_progress_is_reported_after_every_answer() -> None:
    seen: list[tuple[int, int]] = []
    asyncio.run(
        evaluate(
            FakeScriptedEngine(),
            problems(2),
            is_correct,
            sampling=SamplingConfig(),
            samples_per_problem=2,
            seed=0,
            on_rollout=lambda done, total: seen.append((done, total)),
        )
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
