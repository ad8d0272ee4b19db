"""Makes random prompts, rollouts and batches for measurements of speed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen3_distill.config import RunConfig, TaskPrompts
from qwen3_distill.modeling.step_memory import GIB
from qwen3_distill.planning.device import detect_memory
from qwen3_distill.types import (
    Batch,
    FinishReason,
    Prompt,
    Rollout,
    RolloutRequest,
    ScoredRollout,
    TeacherScore,
    TopKRequest,
    TopKScore,
    VersionSpan,
    WeightVersion,
)


@dataclass(frozen=True)
class Work:
    """The amount of work to measure, and its random tokens."""

    config: RunConfig
    sequences: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    opd_steps: int
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    vocab_size: int = 0
    length_of: Callable[[int], int] | None = None
    """New tokens of a rollout of `rollouts` by its number; None: `new_tokens` for all."""

    def ids(self, count: int) -> np.ndarray:
        return self.rng.integers(0, self.vocab_size, count).astype(np.int32)

    def prompt(self) -> Prompt:
        """A new prompt, which no cache holds."""
        name = f"random:{self.rng.integers(1 << 62)}"
        return Prompt(prompt_id=name, token_ids=self.ids(self.prompt_tokens))

    def requests(self, count: int, new_tokens: int) -> list[RolloutRequest]:
        """``samples_per_prompt`` requests for each prompt."""
        samples = self.config.samples_per_prompt
        sampling = self.config.sampling.model_copy(update={"max_new_tokens": new_tokens})
        prompts = [self.prompt() for _ in range(-(-count // samples))]
        requests = [
            RolloutRequest(
                rollout_id=f"{prompt.prompt_id}/{sample}",
                prompt=prompt,
                sampling=sampling.spec(int(self.rng.integers(1 << 31))),
            )
            for prompt in prompts
            for sample in range(samples)
        ]
        return requests[:count]

    def rollouts(self, count: int) -> list[Rollout]:
        """Rollouts of random tokens, each with the logprob of a uniform distribution."""
        version = WeightVersion(step=0, digest="random")
        length_of = self.length_of or (lambda number: self.new_tokens)
        return [
            Rollout(
                rollout_id=request.rollout_id,
                prompt=request.prompt,
                sampling=request.sampling,
                response_ids=self.ids(tokens),
                behavior_logprobs=np.full(tokens, -np.log(self.vocab_size)),
                versions=(VersionSpan(start=0, stop=tokens, version=version),),
                finish_reason=FinishReason.LENGTH,
            )
            for request, tokens in zip(
                self.requests(count, self.new_tokens), map(length_of, range(count)), strict=True
            )
        ]

    def batch(self, count: int) -> Batch:
        """Random rollouts with scores of the kind that the objective needs."""
        request = self.config.objective.score_request
        scored = []
        for rollout in self.rollouts(count):
            tokens = rollout.num_tokens
            logprobs = rollout.behavior_logprobs + 0.1 * self.rng.standard_normal(tokens)
            score = TeacherScore(teacher_id="random", logprobs=logprobs)
            if isinstance(request, TopKRequest):
                ids = np.stack([self.ids(request.k) for _ in range(tokens)])
                ids = (ids[:, :1] + np.arange(request.k)) % self.vocab_size  # distinct
                score = TopKScore(
                    teacher_id="random",
                    logprobs=logprobs,
                    candidate_ids=ids,
                    candidate_logprobs=np.full(ids.shape, -np.log(self.vocab_size)),
                )
            scored.append(ScoredRollout(rollout=rollout, score=score))
        return Batch.uniform(scored)


def for_random_work(config: RunConfig) -> RunConfig:
    """Return the config without data, planned with all of the memory that is free now.

    Some benchmarks plan an engine while others run, which have taken their part of it.
    """
    memory_gib = config.planning.device_memory_gib or detect_memory().free_bytes / GIB
    return config.model_copy(
        update={
            "prompts": TaskPrompts(kind="task"),
            "verifier": None,
            "evaluation": None,
            "planning": config.planning.model_copy(update={"device_memory_gib": memory_gib}),
        }
    )


def total_tokens(rollouts: Sequence[Rollout]) -> int:
    """Tokens of a forward pass: prompts and responses."""
    return sum(r.num_tokens + int(r.prompt.token_ids.size) for r in rollouts)
