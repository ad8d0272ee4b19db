"""Cuts a rollout into pieces: the tokens harvested while it ran, and the remainder.

A piece is a rollout whose prompt ends with the response tokens before it. Scoring, batching and the
denominator therefore treat it like any rollout, and no token belongs to two pieces. At discount 0
a token's loss does not depend on later tokens, so any prefix is as good a sample as a whole answer
(docs/guide/streaming.md).
"""

from dataclasses import dataclass

from qwen3_distill.errors import DataError
from qwen3_distill.types import (
    FinishReason,
    FloatArray,
    IntArray,
    Rollout,
    RolloutPrefix,
    RolloutRequest,
    VersionSpan,
)


def harvested(prefix: RolloutPrefix, start: int) -> Rollout:
    """The piece of a running rollout from response token ``start`` to its newest one."""
    answer = _Answer(
        prefix.request,
        prefix.response_ids,
        prefix.behavior_logprobs,
        prefix.versions,
        prefix.candidate_ids,
    )
    return answer.piece(start, FinishReason.HARVESTED)


def remainder(rollout: Rollout, start: int) -> Rollout | None:
    """The piece of a finished rollout from response token ``start`` on; None if there is none.

    Raises:
        DataError: parts of its response were not sampled, so that it cannot be cut.
    """
    if start == 0:
        return rollout
    if rollout.num_loss_tokens < rollout.num_tokens:
        raise DataError(
            f"rollout {rollout.rollout_id}: {rollout.num_loss_tokens} of its {rollout.num_tokens} "
            "response tokens were sampled; only a response that was sampled as a whole can be cut "
            "into pieces. Set pipeline.harvest to null"
        )
    if start >= rollout.num_tokens:
        return None
    request = RolloutRequest(
        rollout_id=rollout.rollout_id, prompt=rollout.prompt, sampling=rollout.sampling
    )
    answer = _Answer(
        request,
        rollout.response_ids,
        rollout.behavior_logprobs,
        rollout.versions,
        rollout.candidate_ids,
    )
    return answer.piece(start, rollout.finish_reason)


@dataclass(frozen=True)
class _Answer:
    request: RolloutRequest
    response_ids: IntArray
    behavior_logprobs: FloatArray
    versions: tuple[VersionSpan, ...]
    candidate_ids: IntArray | None

    def piece(self, start: int, finish_reason: FinishReason) -> Rollout:
        prompt = self.request.prompt
        if start:
            prompt = prompt.followed_by(self.response_ids[:start])
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
            candidate_ids=None if self.candidate_ids is None else self.candidate_ids[start:],
        )
