"""Requests to vLLM's ``/v1/completions`` and the reading of its replies. Pure functions.

A prompt's logprobs are those of the model, before temperature, top-k and top-p, whatever
``logprobs_mode`` says of logprobs: they do not pass through the sampler. vLLM gives them from the
prompt's second token on, and computes a prompt anew for them even if its prefix cache has it. One
token has to be sampled, and is ignored.

At every place a reply has an object from token id to logprob and rank. The token of the prompt
comes first. With K candidates it has K members if the token is among them, which then has its rank
as a candidate, and K + 1 if it is not.

Shape letters: E tokens of a job from its first scored one to its end, S of them scored, K
candidates, M members of all E objects, R tokens of a sampled answer.
"""

import json
from collections.abc import Callable, Sequence
from itertools import chain
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
    decoded,
    integers,
    list_of,
    logprobs_of,
    member,
    object_of,
)
from qwen3_distill.scoring.served.wire import Wire
from qwen3_distill.types import (
    Prompt,
    Rollout,
    RolloutRequest,
    SamplingSpec,
    ScoreRequest,
    ScoringJob,
    TeacherScore,
    TopKRequest,
    TopKScore,
    WeightVersion,
)
from qwen3_distill.utils.json_text import unique_pairs

MINUS_INFINITY = -9999.0
"""vLLM's number for a logprob of minus infinity."""
MAX_JOBS = 512
"""vLLM takes 1,024 prompts in a request, if it is not told otherwise."""
_BYTES_PER_SEQUENCE = 8 << 10
_BYTES_PER_ID = 16
_BYTES_PER_MEMBER = 128
"""A token id as text, a logprob in full precision, a rank and null take at most 90 bytes."""


def score_body(
    jobs: Sequence[ScoringJob], request: ScoreRequest, *, temperature: float = 1.0
) -> bytes:
    """Return the request for the logprobs of some jobs.

    Args:
        temperature: of the token that is sampled, which must not matter: scores are at
            temperature 1.
    """
    body: dict[str, Any] = {
        "prompt": [job.token_ids.tolist() for job in jobs],
        "max_tokens": 1,
        "temperature": temperature,
        "prompt_logprobs": request.k if isinstance(request, TopKRequest) else 0,
        "add_special_tokens": False,
        "return_token_ids": True,
    }
    return json.dumps(body, separators=(",", ":")).encode()


def score_reply_limit(jobs: Sequence[ScoringJob], request: ScoreRequest) -> int:
    """Return the bytes of the largest possible reply to `score_body`."""
    tokens = sum(int(job.token_ids.size) for job in jobs)
    members = 1 + (request.k if isinstance(request, TopKRequest) else 0)
    per_token = _BYTES_PER_ID + _BYTES_PER_MEMBER * members
    return REPLY_BYTES + _BYTES_PER_SEQUENCE * len(jobs) + per_token * tokens


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

    The whole prompt must be echoed; the values of the tokens in the job's spans are returned.

    Args:
        on_cached: told of the tokens that the server had in its cache, where some could be.

    Raises:
        ReplyError: the reply is not JSON, or has another number of sequences.
    """
    with no_garbage_collection():
        choices = _choices(reply, len(jobs))
        _refuse_repeated_names(reply, choices)
        return [
            _read_one(choice, index, job, request, vocab_size, teacher_id)
            for index, (choice, job) in enumerate(zip(choices, jobs, strict=True))
        ]


def _choices(reply: bytes, count: int) -> list[Any]:
    body = object_of(decoded(reply), "the reply")
    choices = list_of(member(body, "choices"), "choices")
    if len(choices) != count:
        raise ReplyError(FaultKind.COUNT, f"{len(choices)} answers to {count} sequences")
    return choices


def _refuse_repeated_names(reply: bytes, choices: Sequence[Any]) -> None:
    """Refuse an object in which a token stands twice: readers of JSON keep the last, silently."""
    places = [place for choice in choices if type(choice) is dict for place in _listed(choice)]
    members = chain.from_iterable(place.values() for place in places if type(place) is dict)
    read = sum("logprob" in one for one in members if type(one) is dict)
    if reply.count(b'"logprob":') <= read:
        return
    try:  # slow, and rare: a server may also have written a logprob where none is read
        json.loads(reply, object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError):
        raise ReplyError(FaultKind.GARBAGE, "a name stands twice in an object") from None


def _listed(choice: dict[str, Any]) -> list[Any]:
    rows = choice.get("prompt_logprobs")
    return rows if type(rows) is list else []


def _read_one(
    entry: Any,
    index: int,
    job: ScoringJob,
    request: ScoreRequest,
    vocab_size: int,
    teacher_id: str,
) -> TeacherScore | Fault:
    try:
        choice = _choice(entry, index, job.token_ids.tolist())
        rows = _rows(choice, job)
        sent = job.token_ids[job.context_ids.size :].tolist()
        logprobs_E = _token_logprobs(rows, sent)
        scored_S = job.scored_indices - job.context_ids.size
        if not isinstance(request, TopKRequest):
            if any(len(row) != 1 for row in rows):
                raise ReplyError(FaultKind.CANDIDATES, "candidates that were not asked for")
            return TeacherScore(teacher_id=teacher_id, logprobs=logprobs_E[scored_S])
        ids_EK, logprobs_EK = _candidates(rows, request.k, vocab_size)
        check_same_places(ids_EK, logprobs_EK, np.array(sent), logprobs_E)
        return TopKScore(
            teacher_id=teacher_id,
            logprobs=logprobs_E[scored_S],
            candidate_ids=ids_EK[scored_S].astype(np.int32),
            candidate_logprobs=logprobs_EK[scored_S],
        )
    except ReplyError as error:
        return error.fault
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        return Fault(FaultKind.GARBAGE, f"an answer of another form: {type(error).__name__}")


def _choice(entry: Any, index: int, sent: list[int]) -> dict[str, Any]:
    """Return an answer's fields; raise if it is of another prompt, or not complete."""
    choice = object_of(entry, "an answer")
    place = integers([member(choice, "index")], "index")[0]
    if place != index:
        raise ReplyError(FaultKind.MISALIGNED, f"answer {index} has index {place}")
    reason = choice.get("finish_reason")
    if reason in ("abort", "error"):
        raise ReplyError(FaultKind.ABORTED, f"given up: {reason}")
    if reason not in ("stop", "length"):
        raise ReplyError(FaultKind.GARBAGE, "finish_reason is none of stop, length and abort")
    ids = list_of(member(choice, "prompt_token_ids"), "prompt_token_ids")
    if len(ids) != len(sent):
        raise ReplyError(FaultKind.LENGTH, f"an answer to {len(ids)} tokens of {len(sent)} sent")
    if list(integers(ids, "prompt_token_ids")) != sent:
        first = next(i for i, pair in enumerate(zip(ids, sent, strict=True)) if pair[0] != pair[1])
        raise ReplyError(
            FaultKind.MISALIGNED,
            f"the answer is to other tokens than those sent: token {first} is {ids[first]} "
            f"instead of {sent[first]}",
        )
    return choice


def _rows(choice: dict[str, Any], job: ScoringJob) -> list[dict[str, Any]]:
    """Return the E objects from the job's first scored token on."""
    rows = list_of(member(choice, "prompt_logprobs"), "prompt_logprobs")
    if len(rows) != job.token_ids.size:
        raise ReplyError(
            FaultKind.LENGTH, f"logprobs at {len(rows)} places for {job.token_ids.size} tokens"
        )
    if rows[0] is not None:
        raise ReplyError(FaultKind.MISALIGNED, "the first token's logprob is not null")
    rows = rows[job.context_ids.size :]
    missing = sum(row is None or row == {} for row in rows)
    if missing:
        raise ReplyError(FaultKind.MISSING, f"no logprobs at {missing} places")
    for row in rows:
        object_of(row, "the logprobs of a token")
    return rows


def _token_logprobs(rows: Sequence[dict[str, Any]], sent: list[int]) -> NDArray[np.float32]:
    """Return [E] nats; raise unless the first member of every object is the token sent."""
    echoed = [next(iter(row)) for row in rows]
    expected = [str(token) for token in sent]
    if echoed != expected:
        differs = [
            i for i, pair in enumerate(zip(echoed, expected, strict=True)) if len({*pair}) > 1
        ]
        first = differs[0]
        raise ReplyError(
            FaultKind.MISALIGNED,
            f"{len(differs)} of {len(sent)} tokens are not those that were sent; the first is "
            f"{echoed[first]:.20} instead of {expected[first]}, {first + 1} tokens after the "
            "prompt's last",
        )
    return _logprobs_of(
        [row[token] for row, token in zip(rows, echoed, strict=True)], "response tokens"
    )


def _logprobs_of(members: Sequence[Any], what: str) -> NDArray[np.float32]:
    """Return the nats of some members; raise unless all are objects with a finite logprob."""
    if set(map(type, members)) - {dict}:
        raise ReplyError(FaultKind.GARBAGE, f"{what}: the value of a token is not an object")
    values = [member(one, "logprob") for one in members]
    logprobs = logprobs_of(values, what)
    if logprobs.size and logprobs.min() <= MINUS_INFINITY:
        raise ReplyError(
            FaultKind.MISSING, f"a logprob of {what} is {MINUS_INFINITY:g}, vLLM's minus infinity"
        )
    return logprobs


def _candidates(
    rows: Sequence[dict[str, Any]], k: int, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return [E, K] ids and [E, K] nats of the most likely tokens, most likely first."""
    sizes_E = np.array([len(row) for row in rows])
    if ((sizes_E != k) & (sizes_E != k + 1)).any():
        raise ReplyError(FaultKind.CANDIDATES, f"not {k} candidates everywhere")
    members = list(chain.from_iterable(row.values() for row in rows))
    ids_M = np.array(_ids(list(chain.from_iterable(rows)), vocab_size), dtype=np.int64)
    logprobs_M = _logprobs_of(members, "candidates")
    ranks = [member(one, "rank") for one in members]
    if not within(integers(ranks, "ranks"), vocab_size + 1):
        raise ReplyError(FaultKind.CANDIDATES, f"a rank is beyond {vocab_size}")
    # The token sent is in front; where there is a member more, it is no candidate.
    begin_E = np.cumsum(sizes_E) - sizes_E
    is_candidate_M = np.ones(ids_M.size, dtype=bool)
    is_candidate_M[begin_E[sizes_E == k + 1]] = False
    shape = (len(rows), k)
    ranks_EK = np.array(ranks, dtype=np.int64)[is_candidate_M].reshape(shape)
    order_EK = np.argsort(ranks_EK, axis=1, kind="stable")
    if (np.take_along_axis(ranks_EK, order_EK, 1) != np.arange(1, k + 1)).any():
        raise ReplyError(FaultKind.CANDIDATES, f"candidates do not have the ranks 1 to {k}")
    ids_EK = np.take_along_axis(ids_M[is_candidate_M].reshape(shape), order_EK, 1)
    logprobs_EK = np.take_along_axis(logprobs_M[is_candidate_M].reshape(shape), order_EK, 1)
    check_candidates(ids_EK, logprobs_EK)
    return ids_EK, logprobs_EK


def _ids(names: list[str], vocab_size: int) -> list[int]:
    """Return the token ids that are an object's names: decimal numbers, written one way only."""
    try:
        ids = [int(name) for name in names]
    except ValueError:
        raise ReplyError(FaultKind.GARBAGE, "a candidate's name is no token id") from None
    if [str(token) for token in ids] != names or not within(ids, vocab_size):
        raise ReplyError(FaultKind.CANDIDATES, f"candidates are not ids below {vocab_size}")
    return ids


def answer_body(request: RolloutRequest, eos_ids: frozenset[int], vocab_size: int) -> bytes:
    """Return the request for one sampled answer with its logprobs."""
    spec = request.sampling
    body: dict[str, Any] = {
        "prompt": [request.prompt.token_ids.tolist()],
        "max_tokens": spec.max_new_tokens,
        "temperature": spec.temperature,
        "top_p": 1.0 if spec.is_greedy else spec.top_p,
        "top_k": 0 if spec.is_greedy else min(spec.top_k, vocab_size),
        # A server elsewhere takes what is left out from the model's generation_config.json.
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": sorted(eos_ids),
        "seed": spec.seed,
        "logprobs": 0,
        "add_special_tokens": False,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    return json.dumps(body, separators=(",", ":")).encode()


def answer_reply_limit(request: RolloutRequest) -> int:
    """Return the bytes of the largest possible reply to `answer_body`."""
    tokens = int(request.prompt.token_ids.size) + request.sampling.max_new_tokens
    text = 64 * request.sampling.max_new_tokens  # of a server elsewhere that has a tokenizer
    return REPLY_BYTES + _BYTES_PER_SEQUENCE + 2 * _BYTES_PER_MEMBER * tokens + text


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
    (entry,) = _choices(reply, 1)
    try:
        choice = _choice(entry, 0, request.prompt.token_ids.tolist())
        ids, logprobs_R = _answer_tokens(choice, request, vocab_size)
        return answered_rollout(request, ids, logprobs_R, eos_ids, version)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ReplyError(
            FaultKind.GARBAGE, f"an answer of another form: {type(error).__name__}"
        ) from error


def _answer_tokens(
    choice: dict[str, Any], request: RolloutRequest, vocab_size: int
) -> tuple[Sequence[int], NDArray[np.float32]]:
    """Return the R sampled ids and their [R] logprobs in nats; those of greedy tokens are 0."""
    ids = integers(list_of(member(choice, "token_ids"), "token_ids"), "sampled tokens")
    if not ids or len(ids) > request.sampling.max_new_tokens:
        raise ReplyError(
            FaultKind.LENGTH, f"{len(ids)} tokens of {request.sampling.max_new_tokens} allowed"
        )
    if not within(ids, vocab_size):
        raise ReplyError(FaultKind.GARBAGE, f"sampled tokens are not ids below {vocab_size}")
    given = object_of(member(choice, "logprobs"), "logprobs")
    names = list_of(member(given, "tokens"), "tokens")
    if names != [f"token_id:{token}" for token in ids]:
        raise ReplyError(FaultKind.MISALIGNED, "tokens and logprobs are of different answers")
    values = list_of(member(given, "token_logprobs"), "token_logprobs")
    if len(values) != len(ids):
        raise ReplyError(FaultKind.LENGTH, f"{len(values)} logprobs for {len(ids)} tokens")
    logprobs_R = logprobs_of(values, "sampled tokens")
    if logprobs_R.min() <= MINUS_INFINITY:
        raise ReplyError(FaultKind.MISSING, "a logprob of sampled tokens is vLLM's minus infinity")
    if request.sampling.is_greedy:
        logprobs_R = np.zeros_like(logprobs_R)
    return ids, logprobs_R


def _remedy(probe: ScoreRequest) -> str:
    if not isinstance(probe, TopKRequest):
        return ""
    return f"; a server that allows fewer candidates: start it with --max-logprobs {probe.k}"


_ONLY_ONE_TOKEN = SamplingSpec(temperature=1.0, top_p=1.0, top_k=1, max_new_tokens=8, seed=0)

VLLM = Wire(
    kind="vllm",
    engine="vLLM",
    path="/v1/completions",
    max_jobs=MAX_JOBS,
    score_body=score_body,
    score_reply_limit=score_reply_limit,
    read_scores=read_scores,
    answer_body=answer_body,
    answer_reply_limit=answer_reply_limit,
    read_answer=read_answer,
    remedy=_remedy,
    sampling_probe=RolloutRequest(
        rollout_id="a known request",
        prompt=Prompt(prompt_id="a known prompt", token_ids=np.array([5, 3, 8, 2]), task_data={}),
        sampling=_ONLY_ONE_TOKEN,
    ),
    sampling_remedy="start it with --logprobs-mode processed_logprobs",
)
"""The interface of vLLM's servers."""
