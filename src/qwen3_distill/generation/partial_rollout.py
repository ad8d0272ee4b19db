"""A rollout that is still being sampled; the same record for every engine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen3_distill.types import (
    FinishReason,
    IntArray,
    Rollout,
    RolloutPrefix,
    RolloutRequest,
    VersionSpan,
    WeightVersion,
)


@dataclass
class PartialRollout:
    """The tokens sampled for a request so far, and the weights that sampled them."""

    request: RolloutRequest
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    candidates: list[Sequence[int]] = field(default_factory=list)
    """A row of the most likely tokens for each, if the request asks for any."""
    swaps: list[tuple[int, WeightVersion]] = field(default_factory=list)
    """Token counts at which a version came into use, in order; the first is 0."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def add(
        self,
        token_ids: Iterable[int],
        logprobs: Iterable[float],
        candidates: Iterable[Sequence[int]] = (),
    ) -> None:
        """Append sampled tokens and their behavior logprobs in nats; those of greedy tokens are 0.

        An engine's own value for a greedy token may be the one at temperature 1.

        Args:
            candidates: at least ``request.num_candidates`` most likely tokens of each, in order.
        """
        greedy = self.request.sampling.is_greedy
        self.token_ids.extend(token_ids)
        self.logprobs.extend(0.0 if greedy else logprob for logprob in logprobs)
        if self.request.num_candidates:
            self.candidates.extend(row[: self.request.num_candidates] for row in candidates)

    def begin(self, version: WeightVersion, at: int | None = None) -> None:
        """Note that ``version`` samples from token ``at`` on; default: from the next token on."""
        self.swaps.append((self.num_tokens if at is None else at, version))

    def spans(self) -> tuple[VersionSpan, ...]:
        """The span of tokens of every version that sampled any."""
        starts = [min(start, self.num_tokens) for start, _ in self.swaps]
        stops = [*starts[1:], self.num_tokens]
        return tuple(
            VersionSpan(start=start, stop=stop, version=version)
            for start, stop, (_, version) in zip(starts, stops, self.swaps, strict=True)
            if start < stop
        )

    def prefix(self) -> RolloutPrefix:
        """The tokens so far; sampling continues."""
        return RolloutPrefix(
            request=self.request,
            response_ids=np.array(self.token_ids, dtype=np.int32),
            behavior_logprobs=np.array(self.logprobs, dtype=np.float32),
            versions=self.spans(),
            candidate_ids=self._candidate_ids(),
        )

    def _candidate_ids(self) -> IntArray | None:
        count = self.request.num_candidates
        if not count:
            return None
        return np.array(self.candidates, dtype=np.int32).reshape(len(self.candidates), count)

    def rollout(self, finish_reason: FinishReason) -> Rollout:
        return Rollout(
            rollout_id=self.request.rollout_id,
            prompt=self.request.prompt,
            sampling=self.request.sampling,
            response_ids=np.array(self.token_ids, dtype=np.int32),
            behavior_logprobs=np.array(self.logprobs, dtype=np.float32),
            versions=self.spans(),
            finish_reason=finish_reason,
            candidate_ids=self._candidate_ids(),
        )
