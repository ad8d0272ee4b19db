"""A rollout in pieces: what was harvested while it ran, and what came after.

A piece is a rollout whose prompt ends with the response tokens before it. So its teacher scores,
its place in a batch and its share of the denominator need nothing of their own, and no token
belongs to two pieces. At discount 0 a token's loss depends on nothing that comes after it, and
any prefix is as good a sample as a whole answer (docs/streaming.md).
"""

from dataclasses import dataclass

import numpy as np

from qwen3_distill.types import (
    FinishReason,
    FloatArray,
    IntArray,
    Prompt,
    Rollout,
    RolloutPrefix,
    RolloutRequest,
    VersionSpan,
)


def harvested(prefix: RolloutPrefix, start: int) -> Rollout:
    """The tokens of a running rollout from ``start`` on: all that no earlier piece holds."""
    answer = _Answer(prefix.request, prefix.response_ids, prefix.behavior_logprobs, prefix.versions)
    return answer.piece(start, FinishReason.HARVESTED)


def remainder(rollout: Rollout, start: int) -> Rollout | None:
    """What a finished rollout has from ``start`` on; None if its pieces hold all of it."""
    if start == 0:
        return rollout
    if start >= rollout.num_tokens:
        return None
    request = RolloutRequest(
        rollout_id=rollout.rollout_id, prompt=rollout.prompt, sampling=rollout.sampling
    )
    answer = _Answer(request, rollout.response_ids, rollout.behavior_logprobs, rollout.versions)
    return answer.piece(start, rollout.finish_reason)


@dataclass(frozen=True)
class _Answer:
    request: RolloutRequest
    response_ids: IntArray
    behavior_logprobs: FloatArray
    versions: tuple[VersionSpan, ...]

    def piece(self, start: int, finish_reason: FinishReason) -> Rollout:
        whole = self.request.prompt
        prompt = whole
        if start:
            prompt = Prompt(
                prompt_id=whole.prompt_id,
                token_ids=np.concatenate([whole.token_ids, self.response_ids[:start]]),
                task_data=whole.task_data,
            )
        return Rollout(
            rollout_id=f"{self.request.rollout_id}/from-{start:06d}",
            prompt=prompt,
            sampling=self.request.sampling,
            response_ids=self.response_ids[start:],
            behavior_logprobs=self.behavior_logprobs[start:],
            versions=tuple(
                VersionSpan(
                    start=max(span.start - start, 0), stop=span.stop - start, version=span.version
                )
                for span in self.versions
                if span.stop > start
            ),
            finish_reason=finish_reason,
            continues_at=start,
        )
