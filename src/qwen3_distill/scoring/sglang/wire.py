"""Requests to SGLang's ``/generate`` and the reading of its replies. Pure functions.

Every reply is checked as far as possible before it is used: SGLang answers with status 200 even if
a logprob is missing, and JSON has no NaN or infinity, which arrive as null.

Shape letters: E tokens of a job from its first scored one to its end, S of them scored, K
candidates, R tokens of a sampled answer.
"""

import contextlib
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from orjson import loads as _fast_loads
except ImportError:  # slower: 20 us per token with candidates instead of 5
    _fast_loads = json.loads

from qwen3_distill.types import (
    LOGPROB_SLACK_NATS,
    FinishReason,
    IntArray,
    Rollout,
    RolloutRequest,
    ScoreRequest,
    ScoringJob,
    TeacherScore,
    TopKRequest,
    TopKScore,
    VersionSpan,
    WeightVersion,
)

SAME_TOKEN_NATS = 1e-2
"""Largest difference between a token's logprob and the same token's among the candidates: both come
from one softmax, but the server rounds them."""
MAX_TOP_K = 4096
"""SGLang's limit of top-k if the logprobs after truncation are asked for."""


class FaultKind(str, Enum):
    """Kinds of bad or missing replies; retries are counted by kind."""

    GARBAGE = "garbage"
    """Not the expected JSON."""
    COUNT = "count"
    """Another number of sequences than was sent."""
    LENGTH = "length"
    """Another number of tokens than was sent."""
    MISALIGNED = "misaligned"
    """Scores of other tokens than those sent, or of the same tokens at other positions."""
    MISSING = "missing"
    """A logprob that is None, NaN or infinite."""
    POSITIVE = "positive"
    """A logprob above 0."""
    CANDIDATES = "candidates"
    """Candidates other than K distinct tokens of the vocabulary, most likely first."""
    ABORTED = "aborted"
    """The server aborted the sequence."""
    REFUSED = "refused"
    """The server rejected the request; a retry would not help."""
    STATUS = "status"
    """An HTTP status other than 200; a retry may help."""
    TIMEOUT = "timeout"
    """No answer in time."""
    CONNECTION = "connection"
    """No connection, or a broken one."""


@dataclass(frozen=True)
class Fault:
    """Why a job got no score from this reply."""

    kind: FaultKind
    detail: str


class ReplyError(Exception):
    """A reply that cannot be matched with the request: none of it is used."""

    def __init__(self, kind: FaultKind, detail: str) -> None:
        super().__init__(detail)
        self.fault = Fault(kind, detail)


def score_body(jobs: Sequence[ScoringJob], request: ScoreRequest) -> bytes:
    """Return the request for the logprobs of some jobs, from the first scored token of each on."""
    body: dict[str, Any] = {
        "input_ids": [job.token_ids.tolist() for job in jobs],
        # No token is sampled. The first entry of a reply is always null, so the context's last
        # token is asked for too; a later start would lose the first scored token.
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": [job.context_ids.size - 1 for job in jobs],
        "return_text_in_logprobs": False,
    }
    if isinstance(request, TopKRequest):
        body["top_logprobs_num"] = request.k
    return json.dumps(body, separators=(",", ":")).encode()


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
    with _no_garbage_collection():
        entries = _entries(reply, len(jobs))
        on_cached(sum(map(_cached_tokens, entries)))
        return [
            _read_one(entry, job, request, vocab_size, teacher_id)
            for entry, job in zip(entries, jobs, strict=True)
        ]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause the collector: a reply is up to a million small lists without cycles to visit."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _entries(reply: bytes, count: int) -> list[Any]:
    decoded = _decoded(reply)
    if not isinstance(decoded, list):
        raise ReplyError(FaultKind.GARBAGE, f"the reply is a {type(decoded).__name__}, not a list")
    if len(decoded) != count:
        raise ReplyError(FaultKind.COUNT, f"{len(decoded)} answers to {count} sequences")
    return decoded


def _decoded(reply: bytes) -> Any:
    with contextlib.suppress(ValueError):
        return _fast_loads(reply)
    try:
        return json.loads(reply)  # unlike orjson, it reads NaN
    except ValueError as error:
        raise ReplyError(FaultKind.GARBAGE, f"the reply is not JSON: {error}") from error


def _cached_tokens(entry: Any) -> int:
    """Return how many tokens the server did not compute; 0 where an answer does not say it."""
    meta = entry.get("meta_info") if isinstance(entry, dict) else None
    count = meta.get("cached_tokens") if isinstance(meta, dict) else None
    return count if isinstance(count, int) else 0


def _read_one(
    entry: Any, job: ScoringJob, request: ScoreRequest, vocab_size: int, teacher_id: str
) -> TeacherScore | Fault:
    try:
        meta = _meta_info(entry)
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
        return Fault(FaultKind.GARBAGE, f"an answer of another form: {error!r}")


def _meta_info(entry: Any) -> dict[str, Any]:
    meta = entry["meta_info"]
    finish = meta.get("finish_reason") or {}
    if finish.get("type") == "abort":
        raise ReplyError(FaultKind.ABORTED, f"given up: {finish.get('message')}")
    return meta


def _token_logprobs(meta: dict[str, Any], job: ScoringJob, vocab_size: int) -> NDArray[np.float32]:
    """Return [E] nats; raise unless the echoed tokens are those sent."""
    rows = meta["input_token_logprobs"]
    sent = job.token_ids[job.context_ids.size - 1 :]
    if len(rows) != sent.size:
        raise ReplyError(
            FaultKind.LENGTH, f"{len(rows)} logprobs for {sent.size - 1} response tokens and a null"
        )
    values, echoed, *_ = zip(*rows, strict=True)
    if values[0] is not None:
        raise ReplyError(FaultKind.MISALIGNED, "the first logprob is not null")
    _check_echo(np.array(echoed, dtype=np.int64), sent, vocab_size)
    return _finite(np.array(values[1:], dtype=np.float64), "response tokens")


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


def _finite(values: NDArray[np.float64], what: str) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # infinity is found below
        logprobs = values.astype(np.float32)
    finite = np.isfinite(logprobs)
    if not finite.all():
        bad = int((~finite).sum())
        raise ReplyError(
            FaultKind.MISSING, f"{bad} of {values.size} logprobs of {what} are not finite"
        )
    if values.size and values.max() > LOGPROB_SLACK_NATS:
        raise ReplyError(FaultKind.POSITIVE, f"a logprob of {what} is {values.max():.4f}, above 0")
    return logprobs


def _candidates(
    meta: dict[str, Any],
    logprobs_E: NDArray[np.float32],
    job: ScoringJob,
    k: int,
    vocab_size: int,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return [E, K] ids and [E, K] nats of the most likely tokens."""
    rows = meta["input_top_logprobs"]
    if len(rows) != logprobs_E.size + 1:
        raise ReplyError(
            FaultKind.LENGTH, f"candidates at {len(rows)} places, expected {logprobs_E.size + 1}"
        )
    if rows[0] is not None:
        raise ReplyError(FaultKind.MISALIGNED, "the first candidates are not null")
    missing = sum(not row for row in rows[1:])
    if missing:
        raise ReplyError(FaultKind.MISSING, f"no candidates at {missing} places")
    if any(len(row) != k for row in rows[1:]):
        raise ReplyError(FaultKind.CANDIDATES, f"not {k} candidates everywhere")
    values, ids, *_ = zip(*chain.from_iterable(rows[1:]), strict=True)
    shape = (logprobs_E.size, k)
    ids_EK = np.array(ids, dtype=np.int64).reshape(shape)
    logprobs_EK = _finite(np.array(values, dtype=np.float64), "candidates").reshape(shape)
    _check_candidates(ids_EK, logprobs_EK, vocab_size)
    _check_same_places(ids_EK, logprobs_EK, job.token_ids[job.context_ids.size :], logprobs_E)
    return ids_EK.astype(np.int32), logprobs_EK


def _check_candidates(
    ids_EK: NDArray[np.int64], logprobs_EK: NDArray[np.float32], vocab_size: int
) -> None:
    sorted_EK = np.sort(ids_EK, axis=1)
    if ids_EK.min() < 0 or ids_EK.max() >= vocab_size or (np.diff(sorted_EK, axis=1) == 0).any():
        raise ReplyError(
            FaultKind.CANDIDATES, f"candidates are not distinct ids below {vocab_size}"
        )
    if (np.diff(logprobs_EK, axis=1) > 0).any():
        raise ReplyError(FaultKind.CANDIDATES, "candidates are not in the order of likelihood")


def _check_same_places(
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


def read_answer(
    reply: bytes, request: RolloutRequest, eos_ids: frozenset[int], version: WeightVersion
) -> Rollout:
    """Return the answer as a rollout.

    Raises:
        ReplyError: the reply is not a complete answer.
    """
    (entry,) = _entries(reply, 1)
    try:
        meta = _meta_info(entry)
        rows = meta["output_token_logprobs"]
        if not rows or len(rows) > request.sampling.max_new_tokens:
            raise ReplyError(
                FaultKind.LENGTH, f"{len(rows)} tokens of {request.sampling.max_new_tokens} allowed"
            )
        values, ids, *_ = zip(*rows, strict=True)
        if list(ids) != entry["output_ids"]:
            raise ReplyError(FaultKind.MISALIGNED, "tokens and logprobs are of different answers")
        if _is_truncated(request):
            values = meta["output_token_sampling_logprobs"]
        stopped = ids[-1] in eos_ids
        if any(token in eos_ids for token in ids[:-1]):
            raise ReplyError(FaultKind.LENGTH, "the answer goes on after its end")
        if not stopped and len(ids) < request.sampling.max_new_tokens:
            raise ReplyError(FaultKind.LENGTH, f"cut after {len(ids)} tokens")
        logprobs_R = _finite(np.array(values, dtype=np.float64), "sampled tokens")
        if request.sampling.is_greedy:  # SGLang's are those at temperature 1
            logprobs_R = np.zeros_like(logprobs_R)
        return Rollout(
            rollout_id=request.rollout_id,
            prompt=request.prompt,
            sampling=request.sampling,
            response_ids=np.array(ids, dtype=np.int32),
            behavior_logprobs=logprobs_R,
            versions=(VersionSpan(start=0, stop=len(ids), version=version),),
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
        )
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ReplyError(FaultKind.GARBAGE, f"an answer of another form: {error!r}") from error


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
