"""Checks of replies that do not depend on the server's format. Pure functions.

Shape letters: E tokens of a job from its first scored one to its end, K candidates, R tokens of a
sampled answer.
"""

import contextlib
import gc
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qwen3_distill.scoring.served.faults import FaultKind, ReplyError
from qwen3_distill.types import (
    FinishReason,
    IntArray,
    Rollout,
    RolloutRequest,
    VersionSpan,
    WeightVersion,
)

REPLY_BYTES = 64 << 10
"""Largest answer apart from its tokens: an error's text, the fields that a server adds."""
SAME_TOKEN_NATS = 1e-2
"""Largest difference between a token's logprob and the same token's among the candidates: both come
from one softmax, but the server rounds them."""


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause the collector: a reply is up to a million small lists without cycles to visit."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def within(ids: Sequence[int], vocab_size: int) -> bool:
    """Whether all ids are of the vocabulary; checked before numpy, whose integers are bounded."""
    return min(ids) >= 0 and max(ids) < vocab_size


def check_candidates(ids_EK: NDArray[np.int64], logprobs_EK: NDArray[np.float32]) -> None:
    """Raise unless every token's candidates are distinct, most likely first."""
    if (np.diff(np.sort(ids_EK, axis=1), axis=1) == 0).any():
        raise ReplyError(FaultKind.CANDIDATES, "candidates are not distinct")
    if (np.diff(logprobs_EK, axis=1) > 0).any():
        raise ReplyError(FaultKind.CANDIDATES, "candidates are not in the order of likelihood")


def check_same_places(
    ids_EK: NDArray[np.int64],
    logprobs_EK: NDArray[np.float32],
    sent_E: IntArray,
    logprobs_E: NDArray[np.float32],
) -> None:
    """Raise if a token differs from its candidate, or is likely enough to be one and is none."""
    is_token_EK = ids_EK == sent_E[:, None]
    among_E = is_token_EK.any(axis=1)
    as_candidate_E = np.where(is_token_EK, logprobs_EK, 0).sum(axis=1)
    differs_E = among_E & (np.abs(as_candidate_E - logprobs_E) > SAME_TOKEN_NATS)
    differs_E |= ~among_E & (logprobs_E > logprobs_EK[:, -1] + SAME_TOKEN_NATS)
    if differs_E.any():
        raise ReplyError(
            FaultKind.MISALIGNED,
            f"{int(differs_E.sum())} tokens have another logprob than among their candidates",
        )


def answered_rollout(
    request: RolloutRequest,
    ids: Sequence[int],
    logprobs_R: NDArray[np.float32],
    eos_ids: frozenset[int],
    version: WeightVersion,
) -> Rollout:
    """Return an answer as a rollout.

    Raises:
        ReplyError: it goes on after its end, or was cut before it.
    """
    stopped = ids[-1] in eos_ids
    if any(token in eos_ids for token in ids[:-1]):
        raise ReplyError(FaultKind.LENGTH, "the answer goes on after its end")
    if not stopped and len(ids) < request.sampling.max_new_tokens:
        raise ReplyError(FaultKind.LENGTH, f"cut after {len(ids)} tokens")
    return Rollout(
        rollout_id=request.rollout_id,
        prompt=request.prompt,
        sampling=request.sampling,
        response_ids=np.array(ids, dtype=np.int32),
        behavior_logprobs=logprobs_R,
        versions=(VersionSpan(start=0, stop=len(ids), version=version),),
        finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
    )
