"""Builds rollout requests and batches. Pure functions of config and rollout number."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from qwen3_distill.config import PrefixBudget, RewardScale, RunConfig
from qwen3_distill.types import (
    Batch,
    FloatArray,
    Prompt,
    Rollout,
    RolloutRequest,
    TrainingRollout,
)
from qwen3_distill.utils.seeds import derive_seed


def requests_for_step(
    config: RunConfig, prompts: Sequence[Prompt], step: int
) -> list[RolloutRequest]:
    """Build a step's requests: samples of one prompt adjacent, each with a seed of its own."""
    first = step * config.rollouts_per_step
    return [
        request_number(config, prompts[index // config.samples_per_prompt], first + index)
        for index in range(len(prompts) * config.samples_per_prompt)
    ]


def request_number(config: RunConfig, prompt: Prompt, number: int) -> RolloutRequest:
    """Build the request of rollout n = ``number`` of the run: sample n % G of prompt n // G."""
    step, p, g = _place(config, number)
    sampling = config.sampling.spec(derive_seed(config.seed, "rollout", step, p, g))
    temperature = config.rollouts.teacher_temperature
    if temperature is not None and is_teachers(config, number):
        sampling = replace(sampling, temperature=temperature)
    return RolloutRequest(
        rollout_id=rollout_id(config, number),
        prompt=prompt,
        sampling=sampling,
        num_candidates=config.objective.student_candidates,
    )


def rollout_id(config: RunConfig, number: int) -> str:
    """Return the id of a rollout.

    It names the step that trains on it if every step takes the next `rollouts_per_step`.
    """
    step, p, g = _place(config, number)
    return f"step-{step:06d}/prompt-{p:04d}/sample-{g:02d}"


def _place(config: RunConfig, number: int) -> tuple[int, int, int]:
    """Return step, prompt of the step, and sample of the prompt."""
    step, index = divmod(number, config.rollouts_per_step)
    return step, *divmod(index, config.samples_per_prompt)


def is_teachers(config: RunConfig, number: int) -> bool:
    """Whether the teacher samples rollout ``number``; drawn from its prompt's number alone."""
    if config.rollouts.source != "mixture":
        return config.rollouts.source == "teacher"
    seed = derive_seed(config.seed, "teacher-answers", number // config.samples_per_prompt)
    share = config.rollouts.teacher_share
    return share is not None and _uniform(seed) < share


def in_request_order(
    requests: Sequence[RolloutRequest], rollouts: Sequence[Rollout]
) -> list[Rollout]:
    """Sort rollouts into the order of their requests."""
    by_id = {rollout.rollout_id: rollout for rollout in rollouts}
    return [by_id[request.rollout_id] for request in requests]


def make_batch(
    scored: Sequence[TrainingRollout],
    *,
    task_reward_weight: float = 0.0,
    is_correct: Callable[[Rollout], float] | None = None,
    scale: RewardScale = "none",
) -> Batch:
    """Build a uniformly weighted batch, with task advantages where there is a task reward.

    A rollout's advantage is ``weight * (reward - mean reward of its prompt's samples)``, where
    the reward is the verifier's: 1 for a correct answer, 0 for a wrong one, or a number between.

    Args:
        scale: ``std`` divides by the standard deviation of the samples' rewards, with their number
            as its divisor. Where all rewards are equal every advantage is 0 exactly.
    """
    if task_reward_weight == 0:
        return Batch.uniform(scored)
    if is_correct is None:
        raise ValueError("a task reward needs something that checks rollouts")
    rewards = np.array([float(is_correct(s.rollout)) for s in scored], dtype=np.float32)
    groups: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(scored):
        # By occurrence, not by prompt: one prompt drawn twice in a step makes two groups.
        groups[item.rollout.rollout_id.rsplit("/", 1)[0]].append(index)
    for members in groups.values():
        rewards[members] = _relative(rewards[members], scale)
    return Batch(
        scored=tuple(scored),
        importance_weights=np.ones(len(scored), dtype=np.float32),
        task_advantages=task_reward_weight * rewards,
    )


def _relative(rewards_G: FloatArray, scale: RewardScale) -> FloatArray:
    if rewards_G.min() == rewards_G.max():  # their float32 mean may be another number
        return np.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    return centred_G / rewards_G.std() if scale == "std" else centred_G


def is_full_length(run_seed: int, number: int, fraction: float) -> bool:
    """Whether a rollout belongs to the fraction that is never cut; drawn from its number alone."""
    return _uniform(derive_seed(run_seed, "full-length", number)) < fraction


def _uniform(seed: int) -> float:
    """A number in [0, 1) that follows from the seed alone."""
    return float(np.random.Generator(np.random.PCG64(seed)).random())


def with_prefix_budget(
    request: RolloutRequest, budget: PrefixBudget, *, run_seed: int, number: int
) -> RolloutRequest:
    """Copy a request with the budget's token limit, unless its rollout is never cut."""
    if is_full_length(run_seed, number, budget.full_length_fraction):
        return request
    sampling = request.sampling
    limit = min(budget.tokens, sampling.max_new_tokens)
    return replace(request, sampling=replace(sampling, max_new_tokens=limit))
