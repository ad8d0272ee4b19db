"""What one step samples, and the batch that comes of it. Pure functions of config and step."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from qwen3_distill.config import RunConfig, StreamingPipeline
from qwen3_distill.types import (
    Batch,
    Prompt,
    Rollout,
    RolloutRequest,
    ScoredRollout,
)
from qwen3_distill.utils.seeds import derive_seed


def requests_for_step(
    config: RunConfig, prompts: Sequence[Prompt], step: int
) -> list[RolloutRequest]:
    """The step's rollout requests, samples of one prompt adjacent, one seed each."""
    first = step * config.rollouts_per_step
    return [
        request_number(config, prompts[index // config.samples_per_prompt], first + index)
        for index in range(len(prompts) * config.samples_per_prompt)
    ]


def request_number(config: RunConfig, prompt: Prompt, number: int) -> RolloutRequest:
    """Request of rollout ``number`` of the run: sample n % G of prompt n // G.

    Named after the step that takes it when every step takes the next `rollouts_per_step` of them.
    """
    step, index = divmod(number, config.rollouts_per_step)
    p, g = divmod(index, config.samples_per_prompt)
    return RolloutRequest(
        rollout_id=f"step-{step:06d}/prompt-{p:04d}/sample-{g:02d}",
        prompt=prompt,
        sampling=config.sampling.spec(derive_seed(config.seed, "rollout", step, p, g)),
    )


def in_request_order(
    requests: Sequence[RolloutRequest], rollouts: Sequence[Rollout]
) -> list[Rollout]:
    """Rollouts in the order asked for, whatever order they finished in."""
    by_id = {rollout.rollout_id: rollout for rollout in rollouts}
    return [by_id[request.rollout_id] for request in requests]


def make_batch(
    scored: Sequence[ScoredRollout],
    *,
    task_reward_weight: float = 0.0,
    is_correct: Callable[[Rollout], bool] | None = None,
) -> Batch:
    """A uniformly weighted batch; with a task reward, each prompt's samples share a baseline.

    The reward of a rollout is 1 if it is correct, minus the mean over the samples of its prompt,
    times the weight.
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
        rewards[members] -= rewards[members].mean()
    return Batch(
        scored=tuple(scored),
        importance_weights=np.ones(len(scored), dtype=np.float32),
        task_advantages=task_reward_weight * rewards,
    )


def is_full_length(config: RunConfig, number: int, fraction: float) -> bool:
    """Whether a rollout is one of those that are kept whole; drawn by its number alone."""
    seed = derive_seed(config.seed, "full-length", number)
    return bool(np.random.Generator(np.random.PCG64(seed)).random() < fraction)


def shortened(config: RunConfig, request: RolloutRequest, number: int) -> RolloutRequest:
    """The request with the prefix budget's limit, unless the rollout is kept whole."""
    pipeline = config.pipeline
    budget = pipeline.prefix if isinstance(pipeline, StreamingPipeline) else None
    if budget is None or is_full_length(config, number, budget.full_length_fraction):
        return request
    sampling = request.sampling
    limit = min(budget.tokens, sampling.max_new_tokens)
    return replace(request, sampling=replace(sampling, max_new_tokens=limit))
