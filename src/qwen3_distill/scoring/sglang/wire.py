"""Requests to SGLang's ``/generate`` and the reading of its replies. Pure functions.

Every reply is checked as far as possible before it is used: SGLang answers with status 200 even if
a logprob is missing, and JSON has no NaN or infinity, which arrive as null.

Shape letters: E tokens of a job from its first scored one to its end, S of them scored, K
candidates, R tokens of a sampled answer.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_distill.scoring.served.checks import (
    REPLY_BYTES,
    answered_rollout,
    check_candidates,
    check_same_places,
    no_garbage_collection,
    within,
)
from qwen3_distill.scoring.served.faults import Fault, FaultKind, ReplyError
from qwen3_distill.scoring.served.json_values import (
    columns,
    decoded,
    integers,
    list_of,
    logprobs_of,
    member,
    object_of,
)
from qwen3_distill.scoring.served.wire import Wire
from qwen3_distill.scoring.sglang.candidates import AS_ARRAYS, read_candidates
from qwen3_distill.types import (
    IntArray,
    Rollout,
    RolloutRequest,
    ScoreRequest,
    ScoringJob,
    TeacherScore,
    TopKRequest,
    TopKScore,
    WeightVersion,
)

MAX_TOP_K = 4096
"""SGLang's limit of top-k if the logprobs after truncation are asked for."""


_BYTES_PER_SEQUENCE = 8 << 10
_BYTES_PER_ROW = 96
"""A logprob in full precision, its token id and null take at most 45 bytes."""
_BYTES_PER_MASK = 12 * MAX_TOP_K
"""The ids that top-k and top-p kept, for one sampled token."""


def score_body(
    jobs: Sequence[ScoringJob], request: ScoreRequest, *, temperature: float = 1.0
) -> bytes:
    """Return the request for the logprobs of some jobs, from the first scored token of each on.

    Args:
        temperature: of sampling, which must not matter: scores are at temperature 1.
    """
    body: dict[str, Any] = {
        "input_ids": [job.token_ids.tolist() for job in jobs],
        # No token is sampled. The first entry of a reply is always null, so the context's last
        # token is asked for too; a later start would lose the first scored token.
        "sampling_params": {"max_new_tokens": 0, "temperature": temperature},
        "return_logprob": True,
        "logprob_start_len": [job.context_ids.size - 1 for job in jobs],
        "return_text_in_logprobs": False,
    }
    if isinstance(request, TopKRequest):
        body |= {"top_logprobs_num": request.k, **AS_ARRAYS}
    return json.dumps(body, separators=(",", ":")).encode()


def score_reply_limit(jobs: Sequence[ScoringJob], request: ScoreRequest) -> int:
    """Return the bytes of the largest possible reply to `score_body`."""
    rows = sum(int(job.token_ids.size) - int(job.context_ids.size) + 1 for job in jobs)
    lists = 1 + (request.k if isinstance(request, TopKRequest) else 0)
    return REPLY_BYTES + _BYTES_PER_SEQUENCE * len(jobs) + _BYTES_PER_ROW * rows * lists


def read_scores(
    reply: bytes,
    jobs: Sequence[ScoringJob],
    request: ScoreRequest,
    *,
    vocab_size: int,
    teacher_id: str,
    on_cached: Callable[[int], None] = lambda tokens: None,
) -> list[TeacherScore | Fault]:
    """Return one score or fault per job, in the order sent.

    Every echoed token is checked; the values of those in the job's spans are returned.

    Args:
        on_cached: told how many of the tokens the server had in its cache, where it says so.

    Raises:
        ReplyError: the reply is not JSON, or has another number of sequences.
    """
    with no_garbage_collection():
        entries = _entries(reply, len(jobs))
        on_cached(sum(map(_cached_tokens, entries)))
        return [
            _read_one(entry, job, request, vocab_size, teacher_id)
            for entry, job in zip(entries, jobs, strict=True)
        ]


def _entries(reply: bytes, count: int) -> list[Any]:
    entries = list_of(decoded(reply), "the reply")
    if len(entries) != count:
        raise ReplyError(FaultKind.COUNT, f"{len(entries)} answers to {count} sequences")
    return entries


def _cached_tokens(entry: Any) -> int:
    """Return how many tokens the server did not compute; 0 where an answer does not say it."""
    meta = entry.get("meta_info") if isinstance(entry, dict) else None
    count = meta.get("cached_tokens") if isinstance(meta, dict) else None
    return count if type(count) is int and count >= 0 else 0


def _read_one(
    entry: Any, job: ScoringJob, request: ScoreRequest, vocab_size: int, teacher_id: str
) -> TeacherScore | Fault:
    try:
        meta = _meta_info(object_of(entry, "an answer"))
        logprobs_E = _token_logprobs(meta, job, vocab_size)
        scored_S = job.scored_indices - job.context_ids.size
        if not isinstance(request, TopKRequest):
            return TeacherScore(teacher_id=teacher_id, logprobs=logprobs_E[scored_S])
        ids_EK, logprobs_EK = _candidates(meta, logprobs_E, job, request.k, vocab_size)
        return TopKScore(
            teacher_id=teacher_id,
            logprobs=logprobs_E[scored_S],
            candidate_ids=ids_EK[scored_S],
            candidate_logprobs=logprobs_EK[scored_S],
        )
    except ReplyError as error:
        return error.fault
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        return Fault(FaultKind.GARBAGE, f"an answer of another form: {type(error).__name__}")


def _meta_info(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an answer's fields; raise if it is not the end of a sequence."""
    meta = object_of(member(entry, "meta_info"), "meta_info")
    reason = meta.get("finish_reason")
    if reason is None:
        return meta
    kind = object_of(reason, "finish_reason").get("type")
    if kind == "abort":
        raise ReplyError(FaultKind.ABORTED, f"given up: {reason.get('message')!s:.300}")
    if kind not in ("stop", "length"):
        raise ReplyError(FaultKind.GARBAGE, "finish_reason is none of stop, length and abort")
    return meta


def _token_logprobs(meta: dict[str, Any], job: ScoringJob, vocab_size: int) -> NDArray[np.float32]:
    """Return [E] nats; raise unless the echoed tokens are those sent."""
    rows = list_of(member(meta, "input_token_logprobs"), "input_token_logprobs")
    sent = job.token_ids[job.context_ids.size - 1 :]
    if len(rows) != sent.size:
        raise ReplyError(
            FaultKind.LENGTH, f"{len(rows)} logprobs for {sent.size - 1} response tokens and a null"
        )
    values, echoed = columns(rows, "response tokens")
    if values[0] is not None:
        raise ReplyError(FaultKind.MISALIGNED, "the first logprob is not null")
    if not within(echoed, vocab_size):
        raise ReplyError(FaultKind.MISALIGNED, "echoed tokens are not of the vocabulary")
    _check_echo(np.array(echoed, dtype=np.int64), sent, vocab_size)
    return logprobs_of(values[1:], "response tokens")


def _check_echo(echoed: NDArray[np.int64], sent: IntArray, vocab_size: int) -> None:
    # SGLang echoes the vocabulary's last id as 0.
    differs = (echoed != sent) & ~((echoed == 0) & (sent >= vocab_size - 1))
    if differs.any():
        first = int(differs.argmax())
        raise ReplyError(
            FaultKind.MISALIGNED,
            f"{int(differs.sum())} of {sent.size} tokens are not those that were sent; the first "
            f"is {int(echoed[first])} instead of {int(sent[first])}, {first} tokens after the "
            "prompt's last",
        )


def _candidates(
    meta: dict[str, Any],
    logprobs_E: NDArray[np.float32],
    job: ScoringJob,
    k: int,
    vocab_size: int,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return [E, K] ids and [E, K] nats of the most likely tokens."""
    ids_EK, logprobs_EK = read_candidates(meta, logprobs_E.size, k, vocab_size)
    check_candidates(ids_EK, logprobs_EK)
    check_same_places(ids_EK, logprobs_EK, job.token_ids[job.context_ids.size :], logprobs_E)
    return ids_EK.astype(np.int32), logprobs_EK


def answer_body(request: RolloutRequest, eos_ids: frozenset[int], vocab_size: int) -> bytes:
    """Return the request for one sampled answer with its logprobs."""
    spec = request.sampling
    body: dict[str, Any] = {
        "input_ids": [request.prompt.token_ids.tolist()],
        "sampling_params": [
            {
                "max_new_tokens": spec.max_new_tokens,
                "temperature": spec.temperature,
                "top_p": 1.0 if spec.is_greedy else spec.top_p,
                "top_k": _top_k(request, vocab_size),
                "stop_token_ids": sorted(eos_ids),
                # Used only by servers with deterministic inference.
                "sampling_seed": spec.seed,
            }
        ],
        "return_logprob": True,
        "return_text_in_logprobs": False,
    }
    if _is_truncated(request):
        # Else the logprobs are those before top-k and top-p.
        body["return_sampling_mask"] = True
    return json.dumps(body, separators=(",", ":")).encode()


def answer_reply_limit(request: RolloutRequest) -> int:
    """Return the bytes of the largest possible reply to `answer_body`."""
    per_token = 2 * _BYTES_PER_ROW + (_BYTES_PER_MASK if _is_truncated(request) else 0)
    return REPLY_BYTES + _BYTES_PER_SEQUENCE + per_token * request.sampling.max_new_tokens


def read_answer(
    reply: bytes,
    request: RolloutRequest,
    eos_ids: frozenset[int],
    version: WeightVersion,
    *,
    vocab_size: int,
) -> Rollout:
    """Return the answer as a rollout.

    Raises:
        ReplyError: the reply is not a complete answer.
    """
    (entry,) = _entries(reply, 1)
    try:
        ids, logprobs_R = _answer_tokens(object_of(entry, "an answer"), request, vocab_size)
        return answered_rollout(request, ids, logprobs_R, eos_ids, version)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ReplyError(
            FaultKind.GARBAGE, f"an answer of another form: {type(error).__name__}"
        ) from error


def _answer_tokens(
    entry: dict[str, Any], request: RolloutRequest, vocab_size: int
) -> tuple[Sequence[int], NDArray[np.float32]]:
    """Return the R sampled ids and their [R] logprobs in nats; those of greedy tokens are 0."""
    meta = _meta_info(entry)
    rows = list_of(member(meta, "output_token_logprobs"), "output_token_logprobs")
    if not rows or len(rows) > request.sampling.max_new_tokens:
        raise ReplyError(
            FaultKind.LENGTH, f"{len(rows)} tokens of {request.sampling.max_new_tokens} allowed"
        )
    values, ids = columns(rows, "sampled tokens")
    if not within(ids, vocab_size):
        raise ReplyError(FaultKind.GARBAGE, f"sampled tokens are not ids below {vocab_size}")
    output_ids = integers(list_of(member(entry, "output_ids"), "output_ids"), "output_ids")
    if list(ids) != output_ids:
        raise ReplyError(FaultKind.MISALIGNED, "tokens and logprobs are of different answers")
    if _is_truncated(request):
        name = "output_token_sampling_logprobs"
        values = list_of(member(meta, name), name)
        if len(values) != len(ids):
            raise ReplyError(FaultKind.LENGTH, f"{len(values)} logprobs for {len(ids)} tokens")
    logprobs_R = logprobs_of(values, "sampled tokens")
    if request.sampling.is_greedy:  # SGLang's are those at temperature 1
        logprobs_R = np.zeros_like(logprobs_R)
    return ids, logprobs_R


def _top_k(request: RolloutRequest, vocab_size: int) -> int:
    if not _is_truncated(request):
        return -1
    # SGLang gives logprobs after truncation only with a limited top-k. With top-p alone it cuts a
    # nucleus of more than 4,096 tokens; the logprobs are still those of the distribution sampled.
    return min(request.sampling.top_k or vocab_size, vocab_size, MAX_TOP_K)


def _is_truncated(request: RolloutRequest) -> bool:
    if request.sampling.is_greedy:
        return False  # the most likely token is never cut off
    return request.sampling.top_p < 1 or request.sampling.top_k > 0


SGLANG = Wire(
    kind="sglang",
    engine="SGLang",
    path="/generate",
    reads_cache=True,
    # Python's garbage collection then leaves out what its processes made at their start: hundreds
    # of thousands of objects, read again and again while lists of candidates are made.
    settle_path="/freeze_gc",
    starts_first=True,
    score_body=score_body,
    score_reply_limit=score_reply_limit,
    read_scores=read_scores,
    answer_body=answer_body,
    answer_reply_limit=answer_reply_limit,
    read_answer=read_answer,
)
"""The interface of SGLang's servers."""
