"""Describes a step's work, as far as time depends on it: lengths, and the decode steps they need.

How long answers are is not in a config. A plan assumes it: all of one length, or lognormal with a
tail, cut at the longest that is allowed.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from qwen3_distill.errors import ConfigError
from qwen3_distill.utils.batches import packed_rows

_Z_99 = NormalDist().inv_cdf(0.99)
_GOLDEN = (math.sqrt(5) - 1) / 2
_MAX_DRAWN = 4096
"""Rollouts that are told apart; more are taken in proportion."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The assumed lengths of answers."""

    median_tokens: int
    tail: float = 1.0
    """99th percentile over the median; 1: all have the same length."""
    max_tokens: int
    """The longest; longer ones are cut."""

    def lengths(self, count: int) -> list[int]:
        """Return ``count`` lengths at equal steps of probability, in an order without a trend.

        Raises:
            ConfigError: the median is above the longest, or the tail is below 1.
        """
        if self.tail < 1 or not math.isfinite(self.tail):
            raise ConfigError(f"--tail {self.tail:g}: expected a number from 1 on")
        if not 1 <= self.median_tokens <= self.max_tokens:
            raise ConfigError(
                f"--response-tokens {self.median_tokens}: expected 1 to {self.max_tokens}, the "
                "longest answer by sampling.max_new_tokens"
            )
        if self.tail == 1:
            return [self.median_tokens] * count
        spread, normal = math.log(self.tail) / _Z_99, NormalDist()
        found = []
        # Steps of the golden ratio mix them: neighbours are far apart.
        for rank in sorted(range(count), key=lambda index: index * _GOLDEN % 1.0):
            z = normal.inv_cdf((rank + 0.5) / count)
            tokens = self.median_tokens * math.exp(z * spread)
            found.append(round(min(max(tokens, 1.0), self.max_tokens)))
        return found


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The rollouts of a step or an evaluation."""

    count: int
    prompt_tokens: int
    responses: tuple[int, ...]
    """New tokens of each, or of a sample of them that stands for all."""
    samples_per_prompt: int = 1

    @classmethod
    def of(
        cls, answers: Answers, *, count: int, prompt_tokens: int, samples_per_prompt: int = 1
    ) -> "Rollouts":
        """Draw the lengths of ``count`` rollouts."""
        drawn = tuple(answers.lengths(min(count, _MAX_DRAWN)))
        return cls(
            count=count,
            prompt_tokens=prompt_tokens,
            responses=drawn,
            samples_per_prompt=samples_per_prompt,
        )

    def of_one(self, engines: int) -> "Rollouts":
        """Return the rollouts of the engine, of several, that has the longest answer."""
        if engines == 1 or not self.responses:
            return self
        longest_first = sorted(range(len(self.responses)), key=lambda at: -self.responses[at])
        kept = sorted(longest_first[::engines])
        return replace(
            self,
            count=math.ceil(self.count / engines),
            responses=tuple(self.responses[at] for at in kept),
        )

    @property
    def weight(self) -> float:
        """Rollouts that each drawn one stands for."""
        return self.count / len(self.responses)

    @property
    def new_tokens(self) -> float:
        return sum(self.responses) * self.weight

    @property
    def tokens(self) -> float:
        """Prompts and responses, as scoring and training read them."""
        return self.new_tokens + self.count * self.prompt_tokens

    @property
    def prefilled(self) -> float:
        """Tokens of prompts that sampling computes: each prompt's once."""
        return self.prompt_tokens * math.ceil(self.count / self.samples_per_prompt)

    @property
    def lengths(self) -> list[int]:
        """Prompt and response of each drawn rollout."""
        return [self.prompt_tokens + tokens for tokens in self.responses]

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key that it sees, of all rollouts."""
        return self.weight * sum(length * (length + 1) / 2 for length in self.lengths)


def shared_rows(
    responses: Sequence[int], prompt_tokens: int, samples_per_prompt: int, max_tokens: int
) -> list[tuple[list[int], int]]:
    """Lay out micro-batches in which a prompt stands once before its answers.

    As `training.batching` does: neighbours have a prompt in common, and answers that do not fit
    behind it get it again. Returns each micro-batch's responses, and its number of prompts.
    """
    groups: list[list[int]] = []
    for start in range(0, len(responses), samples_per_prompt):
        answers = responses[start : start + samples_per_prompt]
        parts = packed_rows(answers, max(max_tokens - prompt_tokens, 0))
        groups += [[answers[place] for place in part] for part in parts]
    rows = packed_rows([prompt_tokens + sum(group) for group in groups], max_tokens)
    return [([tokens for place in row for tokens in groups[place]], len(row)) for row in rows]


@dataclass(frozen=True)
class Segment:
    """Decode steps in a row with the same rollouts in flight."""

    steps: int
    batch: int
    cached_tokens: int
    """Tokens in the cache before the first of the steps, of all rollouts in flight."""

    @property
    def read_tokens(self) -> int:
        """Cached tokens that the steps read, each step all of them."""
        return self.steps * self.cached_tokens + self.batch * self.steps * (self.steps + 1) // 2


def decode_segments(
    responses: Sequence[int], prompt_tokens: int, max_sequences: int
) -> Iterator[Segment]:
    """Follow continuous batching: a rollout that ends makes room for the next at once."""
    waiting = list(reversed(responses))
    running: list[tuple[int, int]] = []  # (step of its end, step of its begin), a heap
    now, cached = 0, 0
    while waiting or running:
        while waiting and len(running) < max_sequences:
            heapq.heappush(running, (now + waiting.pop(), now))
            cached += prompt_tokens
        steps = running[0][0] - now
        yield Segment(steps, len(running), cached)
        now, cached = now + steps, cached + steps * len(running)
        while running and running[0][0] == now:
            end, begin = heapq.heappop(running)
            cached -= prompt_tokens + end - begin
