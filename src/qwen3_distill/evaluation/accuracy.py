"""Measures a sampler's accuracy on held-out problems."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from qwen3_distill.config import SamplingConfig
from qwen3_distill.data.tags import tag_of
from qwen3_distill.ports import Sampler
from qwen3_distill.types import FinishReason, Prompt, Rollout, RolloutRequest
from qwen3_distill.utils.seeds import derive_seed

Z_95 = 1.959964
"""Two-sided 95% quantile of the normal distribution."""


_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Mean accuracy, or mean reward, over problems, with its 95% interval."""

    accuracy: float
    ci_low: float
    ci_high: float
    num_problems: int
    samples_per_problem: int
    mean_tokens: float
    truncated_fraction: float
    by_tag: Mapping[str, "TagAccuracy"] = field(default_factory=dict)
    """Where every tag of the prompts has a teacher of its own: each tag's accuracy."""

    def record(self) -> dict[str, float]:
        """Return the fields as JSON values; those of a tag as ``accuracy/math``."""
        values = asdict(self)
        by_tag: Mapping[str, Mapping[str, float]] = values.pop("by_tag")
        for tag, fields in by_tag.items():
            values |= {f"{name}/{tag}": value for name, value in fields.items()}
        return values


@dataclass(frozen=True, kw_only=True)
class TagAccuracy:
    """Mean accuracy, or mean reward, over one tag's problems, with its 95% interval."""

    accuracy: float
    ci_low: float
    ci_high: float
    num_problems: int


async def evaluate(
    engine: Sampler,
    problems: Sequence[Prompt],
    is_correct: Callable[[Rollout], float],
    *,
    sampling: SamplingConfig,
    samples_per_problem: int,
    seed: int,
    on_rollout: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationResult:
    """Sample every problem and check the answers.

    Seeds derive from ``seed`` and the problem. So two evaluations with one seed use the same
    random numbers, which makes their difference less noisy, and a training run is not affected.

    Args:
        on_rollout: called with (finished, all) after each answer.
    """
    requests = [
        RolloutRequest(
            rollout_id=f"eval/{prompt.prompt_id}/{sample}",
            prompt=prompt,
            sampling=sampling.spec(derive_seed(seed, "evaluation", prompt.prompt_id, sample)),
        )
        for prompt in problems
        for sample in range(samples_per_problem)
    ]
    correct_by_prompt: dict[str, list[float]] = {prompt.prompt_id: [] for prompt in problems}
    lengths: list[int] = []
    truncated = 0
    async for rollout in engine.generate(requests):
        correct_by_prompt[rollout.prompt.prompt_id].append(is_correct(rollout))
        lengths.append(rollout.num_tokens)
        truncated += rollout.finish_reason is FinishReason.LENGTH
        on_rollout(len(lengths), len(requests))
    whole = _measured(list(correct_by_prompt.values()), samples_per_problem)
    tags = {prompt.prompt_id: tag_of(prompt) for prompt in problems}
    by_tag = {
        tag: _measured([correct_by_prompt[p] for p in tags if tags[p] == tag], samples_per_problem)
        for tag in dict.fromkeys(tag for tag in tags.values() if tag is not None)
    }
    return EvaluationResult(
        **asdict(whole),
        by_tag=by_tag,
        samples_per_problem=samples_per_problem,
        mean_tokens=float(np.mean(lengths)),
        truncated_fraction=truncated / len(lengths),
    )


def _measured(correct: Sequence[Sequence[float]], samples_per_problem: int) -> TagAccuracy:
    """Return the mean over problems of the means of their samples, with its interval."""
    rates = np.array([np.mean(values) for values in correct])
    binary = all(value in (0, 1) for values in correct for value in values)
    low, high = accuracy_interval(rates, samples_per_problem) if binary else reward_interval(rates)
    return TagAccuracy(
        accuracy=float(rates.mean()), ci_low=low, ci_high=high, num_problems=len(rates)
    )


def reward_interval(means: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of the mean of per-problem rewards in [0, 1], by bootstrap.

    Problems are drawn again with replacement, 10,000 times; the 2.5% and 97.5% quantiles of the
    means count. Samples of one problem stay together. With one problem, or equal rewards, there is
    no spread to draw from: then it is Wilson's interval for the mean, the widest that rewards in
    [0, 1] can need.
    """
    if len(means) < 2 or float(np.ptp(means)) == 0:
        return accuracy_interval(means, 1)
    generator = np.random.Generator(np.random.PCG64(0))
    drawn = [  # one at a time: all at once would take gigabytes
        means[generator.integers(0, len(means), len(means))].mean() for _ in range(_RESAMPLES)
    ]
    low, high = (float(bound) for bound in np.quantile(drawn, [0.025, 0.975]))
    mean = float(means.mean())
    return min(low, mean), max(high, mean)


def accuracy_interval(rates: np.ndarray, samples_per_problem: int) -> tuple[float, float]:
    """The 95% Wilson interval of the mean of per-problem accuracies.

    Samples of one problem are not independent. The effective number of trials is the one whose
    binomial variance equals the variance between problems, clipped to lie between the numbers of
    problems and of samples. With one sample per problem it is the plain Wilson interval.
    """
    num_problems = len(rates)
    mean = float(rates.mean())
    trials = float(num_problems)
    if samples_per_problem > 1 and num_problems > 1:
        variance = float(rates.var(ddof=1)) / num_problems
        if 0 < mean < 1:
            trials = mean * (1 - mean) / variance if variance > 0 else math.inf
        trials = min(max(trials, num_problems), num_problems * samples_per_problem)
    centre = (mean + Z_95**2 / (2 * trials)) / (1 + Z_95**2 / trials)
    spread = math.sqrt(mean * (1 - mean) / trials + Z_95**2 / (4 * trials**2))
    half = Z_95 * spread / (1 + Z_95**2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)
