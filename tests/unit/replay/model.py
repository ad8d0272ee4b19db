"""A replay buffer in plain Python, and rollouts whose every value says where it belongs."""

from dataclasses import dataclass

import numpy as np

from qwen3_distill.types import (
    FinishReason,
    Prompt,
    Rollout,
    SamplingSpec,
    ScoredRollout,
    TeacherScore,
    TokenSpan,
    TopKScore,
    VersionSpan,
    WeightVersion,
)


def scored_rollout(
    number: int,
    prompt_tokens: int,
    response_tokens: int,
    *,
    step: int = 0,
    candidates: int = 0,
    unsampled_every: int = 0,
) -> ScoredRollout:
    """Token t of rollout i is 1000 i + t; its logprobs are made of the same number.

    Args:
        unsampled_every: n: response tokens n - 1, 2 n - 1, ... were not sampled; 0: all were.
    """
    sampled = spans_between(response_tokens, unsampled_every)
    ids = 1000 * number + prompt_tokens + np.arange(response_tokens)
    address = np.concatenate([ids[span.start : span.stop] for span in sampled])
    behavior = -(address + 1) / 1e5
    split, size = len(address) // 2, len(address)  # half of a longer response has newer weights
    versions = [VersionSpan(start=split, stop=size, version=_version(step + 1))]
    if split:
        versions.insert(0, VersionSpan(start=0, stop=split, version=_version(step)))
    else:
        versions = [VersionSpan(start=0, stop=size, version=_version(step))]
    rollout = Rollout(
        rollout_id=f"r{number}",
        prompt=Prompt(prompt_id=f"p{number}", token_ids=1000 * number + np.arange(prompt_tokens)),
        sampling=SamplingSpec(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=9999, seed=0),
        response_ids=ids,
        behavior_logprobs=behavior,
        versions=tuple(versions),
        finish_reason=FinishReason.LENGTH,
        sampled=sampled,
    )
    score = TeacherScore(teacher_id="t", logprobs=2 * behavior)
    if candidates:
        k = np.arange(candidates)
        score = TopKScore(
            teacher_id="t",
            logprobs=2 * behavior,
            candidate_ids=address[:, None] + k,
            candidate_logprobs=-(address[:, None] + k + 1) / 1e4,
        )
    return ScoredRollout(rollout=rollout, score=score)


def spans_between(response_tokens: int, unsampled_every: int) -> tuple[TokenSpan, ...]:
    """Spans that leave out every n-th token of the response."""
    n = unsampled_every or response_tokens + 1
    starts = range(0, response_tokens, n)
    return tuple(TokenSpan(start=a, stop=min(a + n - 1, response_tokens)) for a in starts)


def _version(step: int) -> WeightVersion:
    return WeightVersion(step=step, digest=str(step))


def num_tokens(scored: ScoredRollout) -> int:
    return scored.rollout.prompt.token_ids.size + scored.rollout.num_tokens


@dataclass
class Held:
    """A rollout in the model."""

    number: int
    scored: ScoredRollout
    first: int
    """Its first token, counted on over every lap of the ring."""
    live: bool = True
    uses: int = 0

    @property
    def oldest_step(self) -> int:
        return self.scored.rollout.versions[0].version.step


class ModelBuffer:
    """What `ReplayBuffer` promises, one rollout at a time."""

    def __init__(self, *, tokens: int, rollouts: int, reuse_cap: int | None) -> None:
        self.tokens, self.rollouts, self.reuse_cap = tokens, rollouts, reuse_cap
        self.end = 0
        self.held: list[Held] = []
        self.added = 0
        self.evicted = {"capacity": 0, "age": 0, "reuse": 0}

    @property
    def live(self) -> list[Held]:
        return [held for held in self.held if held.live]

    def add(self, scored: list[ScoredRollout]) -> None:
        firsts, end = self._placed(scored, self.end)
        if end - self.end > self.tokens:  # would meet its own beginning
            firsts, end = self._placed(scored, self.end + -self.end % self.tokens)
        new = [
            Held(self.added + i, entry, first)
            for i, (entry, first) in enumerate(zip(scored, firsts, strict=True))
        ]
        while self.held and (
            len(self.held) + len(new) > self.rollouts or self.held[0].first < end - self.tokens
        ):
            self.evicted["capacity"] += self.held.pop(0).live
        self.held += new
        self.added += len(new)
        self.end = end

    def _placed(self, scored: list[ScoredRollout], cursor: int) -> tuple[list[int], int]:
        """One behind another; what would pass the ring's end begins at its start."""
        firsts = []
        for entry in scored:
            size = num_tokens(entry)
            if cursor % self.tokens + size > self.tokens:
                cursor += -cursor % self.tokens
            firsts.append(cursor)
            cursor += size
        return firsts, cursor

    def evict_older_than(self, max_age: int, step: int) -> None:
        for held in self.live:
            if step - held.oldest_step > max_age:
                held.live = False
                self.evicted["age"] += 1

    def mark_used(self, numbers: list[int]) -> None:
        for held in self.live:
            if held.number in numbers:
                held.uses += 1
                if self.reuse_cap is not None and held.uses >= self.reuse_cap:
                    held.live = False
                    self.evicted["reuse"] += 1
