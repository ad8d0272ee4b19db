"""Odd replies of a vLLM server to scoring requests, read by the package and by a plain reference.

As `replies` does it for SGLang: a reply that is accepted must hold exactly the numbers that the
reference reads, and a reply that the reference can read must be accepted.
"""

import json
import random
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.robustness.fuzz.counts import Counts, Progress
from benchmarks.robustness.fuzz.mutations import mutated
from benchmarks.robustness.fuzz.replies import LIMIT_S, VOCAB, compare, random_jobs
from benchmarks.robustness.fuzz.reply_meaning import SAME_TOKEN_NATS, Odd, Said, logprob
from benchmarks.robustness.fuzz.watchdog import Hang, time_limit
from qwen3_distill.scoring.vllm.wire import read_scores
from qwen3_distill.types import ScoreRequest, ScoringJob, TopKRequest
from qwen3_distill.utils.secrets import remember_secret

MINUS_INFINITY = -9999.0


def run(seed: int, count: int) -> Counts:
    """Read ``count`` odd replies to scoring requests."""
    rng = random.Random(seed)
    secret = f"sk-{rng.getrandbits(160):040x}"
    remember_secret(secret)
    counts, progress = Counts(), Progress("vllm_replies", count)
    for _ in range(count):
        counts.tried += 1
        raw = b""
        try:
            with time_limit(LIMIT_S):
                jobs, request = random_jobs(rng)
                raw = mutated(valid_reply(jobs, request, rng), rng, secret)
                _try(_with_a_name_twice(raw, rng), jobs, request, counts, secret)
        except Hang:
            counts.hang(f"{raw[:200]!r}")
        except Exception:  # noqa: BLE001 - what is looked for
            counts.traceback(f"{traceback.format_exc(limit=-2)} at {raw[:200]!r}")
        progress.show(counts)
    return counts


def valid_reply(
    jobs: Sequence[ScoringJob], request: ScoreRequest, rng: random.Random
) -> dict[str, Any]:
    """Return a valid reply to a scoring request, as JSON values."""
    choices = [_choice(i, job.token_ids.tolist(), request, rng) for i, job in enumerate(jobs)]
    return {"id": "cmpl-1", "object": "text_completion", "choices": choices}


def _choice(index: int, ids: list[int], request: ScoreRequest, rng: random.Random) -> Any:
    k = request.k if isinstance(request, TopKRequest) else 0
    places: list[Any] = [None, *(_place(token, k, rng) for token in ids[1:])]
    return {
        "index": index,
        "text": "",
        "logprobs": None,
        "finish_reason": rng.choice(("stop", "length")),
        "token_ids": [0],
        "prompt_logprobs": places,
        "prompt_token_ids": ids,
    }


def _place(token: int, k: int, rng: random.Random) -> dict[str, Any]:
    """Return the token in front, and behind it the k most likely ones, which it may be among."""
    ranked = rng.sample(range(VOCAB), k)
    values = sorted((-rng.expovariate(1.0) for _ in ranked), reverse=True)
    least = values[-1] if values else 0.0
    place = {str(token): _member(least - rng.expovariate(1.0), k + 1 + rng.randrange(3))}
    for rank, (candidate, value) in enumerate(zip(ranked, values, strict=True), 1):
        place[str(candidate)] = _member(value, rank)
    return place


def _member(value: float, rank: int) -> dict[str, Any]:
    return {"logprob": value, "rank": rank, "decoded_token": None}


def _with_a_name_twice(raw: bytes, rng: random.Random) -> bytes:
    """Write some logprob again, with another value, in one reply of ten."""
    if rng.random() >= 0.1:
        return raw
    return raw.replace(b'"logprob": ', b'"logprob": -7.5, "logprob": ', 1)


def _try(
    raw: bytes, jobs: list[ScoringJob], request: ScoreRequest, counts: Counts, secret: str
) -> None:
    k = request.k if isinstance(request, TopKRequest) else None
    compare(
        raw,
        lambda: meaning(raw, jobs, k),
        lambda: read_scores(raw, jobs, request, vocab_size=VOCAB, teacher_id="t"),
        counts,
        secret,
    )


def meaning(reply: bytes, jobs: Sequence[ScoringJob], k: int | None) -> list[Said | None]:
    """Return what the reply says of each job; None where it says nothing valid.

    Raises:
        Odd: the whole reply says nothing.
    """
    try:
        value = json.loads(reply.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Odd(type(error).__name__) from error
    choices = _get(value, "choices")
    if type(choices) is not list or len(choices) != len(jobs):
        raise Odd("another number of answers")
    found: list[Said | None] = []
    for index, (choice, job) in enumerate(zip(choices, jobs, strict=True)):
        try:
            found.append(_said(choice, index, job, k))
        except Odd:
            found.append(None)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _said(choice: Any, index: int, job: ScoringJob, k: int | None) -> Said:
    ids: list[int] = job.token_ids.tolist()
    place = _get(choice, "index")
    _need(type(place) is int and place == index)
    reason = _get(choice, "finish_reason")
    _need(type(reason) is str and reason in ("stop", "length"))
    sent = _get(choice, "prompt_token_ids")
    _need(type(sent) is list and all(type(one) is int for one in sent) and sent == ids)
    places = _get(choice, "prompt_logprobs")
    _need(type(places) is list and len(places) == len(ids) and places[0] is None)
    first = int(job.scored_indices[0])
    read = {at: _read(places[at], ids[at], k) for at in range(first, len(ids))}
    scored = [read[int(at)] for at in job.scored_indices]
    return Said(
        [own for own, _ in scored],
        [] if k is None else [[token for _, token in pairs] for _, pairs in scored],
        [] if k is None else [[value for value, _ in pairs] for _, pairs in scored],
    )


def _read(given: Any, token: int, k: int | None) -> tuple[float, list[tuple[float, int]]]:
    """Return the token's logprob and its candidates, most likely first."""
    _need(type(given) is dict and bool(given))
    place: dict[str, Any] = given
    names = list(place)
    _need(names[0] == str(token))
    own = _finite(place[names[0]])
    if k is None:
        _need(len(names) == 1)
        return own, []
    _need(len(names) in (k, k + 1))
    for name in names:
        _need(name.isascii() and name.isdigit() and str(int(name)) == name and int(name) < VOCAB)
        _finite(place[name])
        rank = _get(place[name], "rank")
        _need(type(rank) is int and 0 <= rank <= VOCAB)
    kept = names[1:] if len(names) == k + 1 else names
    ranked = sorted(kept, key=lambda name: place[name]["rank"])
    _need([place[name]["rank"] for name in ranked] == list(range(1, k + 1)))
    pairs = [(_finite(place[name]), int(name)) for name in ranked]
    values = [value for value, _ in pairs]
    _need(values == sorted(values, reverse=True))
    among = [value for value, candidate in pairs if candidate == token]
    if among:
        _need(abs(np.float32(among[0]) - np.float32(own)) <= SAME_TOKEN_NATS)
    else:
        _need(np.float32(own) <= np.float32(values[-1]) + np.float32(SAME_TOKEN_NATS))
    return own, pairs


def _finite(member: Any) -> float:
    value = logprob(_get(member, "logprob"))
    _need(value > MINUS_INFINITY)
    return value


def _get(container: Any, name: str) -> Any:
    _need(type(container) is dict and name in container)
    return container[name]


def _need(holds: Any) -> None:
    if not holds:
        raise Odd
