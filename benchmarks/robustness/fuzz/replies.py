"""Odd replies of a scoring server, read by the package and by a plain reference.

A reply that is accepted must hold exactly the numbers that the reference reads, and a reply that
the reference can read must be accepted. Details of faults must be printable, short and without the
key that some replies hold.
"""

import base64
import json
import random
import traceback
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from benchmarks.robustness.fuzz.counts import Counts, Progress
from benchmarks.robustness.fuzz.mutations import mutated
from benchmarks.robustness.fuzz.reply_meaning import Asked, Odd, Said, logprob, meaning
from benchmarks.robustness.fuzz.watchdog import Hang, time_limit
from qwen3_distill.scoring.served.faults import Fault, ReplyError
from qwen3_distill.scoring.sglang.wire import read_answer, read_scores
from qwen3_distill.types import (
    Prompt,
    Rollout,
    RolloutRequest,
    SampledRequest,
    SamplingSpec,
    ScoreRequest,
    ScoringJob,
    TeacherScore,
    TokenSpan,
    TopKRequest,
    TopKScore,
    WeightVersion,
)
from qwen3_distill.utils.printable import printable
from qwen3_distill.utils.secrets import remember_secret

LIMIT_S = 5.0
VOCAB = 50
EOS = 49
MAX_NEW = 5
_LONGEST_DETAIL = 1000


def run(seed: int, count: int) -> Counts:
    """Read ``count`` odd replies: four in five to scoring requests, the others sampled answers."""
    rng = random.Random(seed)
    secret = f"sk-{rng.getrandbits(160):040x}"
    remember_secret(secret)
    counts, progress = Counts(), Progress("replies", count)
    for index in range(count):
        counts.tried += 1
        raw = b""
        try:
            with time_limit(LIMIT_S):
                if index % 5:
                    jobs, request = random_jobs(rng)
                    raw = mutated(valid_scores(jobs, request, rng, VOCAB), rng, secret)
                    _try_scores(raw, jobs, request, counts, secret)
                else:
                    asked = _random_request(rng)
                    raw = mutated(_valid_answer(asked, rng), rng, secret)
                    _try_answer(raw, asked, counts, secret)
        except Hang:
            counts.hang(f"{raw[:200]!r}")
        except Exception:  # noqa: BLE001 - what is looked for
            counts.traceback(f"{traceback.format_exc(limit=-2)} at {raw[:200]!r}")
        progress.show(counts)
    return counts


def random_jobs(rng: random.Random) -> tuple[list[ScoringJob], ScoreRequest]:
    """Draw some jobs, and what is asked for them."""
    jobs: list[ScoringJob] = []
    for number in range(rng.randint(1, 3)):
        size = rng.randint(2, 9)
        start = rng.randint(1, size - 1)
        spans = [TokenSpan(start=start, stop=rng.randint(start + 1, size))]
        if spans[0].stop + 1 < size:
            spans.append(TokenSpan(start=spans[0].stop + 1, stop=size))
        ids = np.array([rng.randrange(VOCAB) for _ in range(size)], dtype=np.int32)
        jobs.append(ScoringJob(rollout_id=f"r{number}", token_ids=ids, scored=tuple(spans)))
    return jobs, rng.choice((SampledRequest(), TopKRequest(k=rng.randint(1, 4))))


def asked_of(job: ScoringJob) -> Asked:
    """Return what a request asks of a server for a job."""
    first = int(job.context_ids.size)
    scored = [int(place) - first for place in job.scored_indices]
    return Asked(ids=job.token_ids[first - 1 :].tolist(), scored=scored)


def valid_scores(
    jobs: Sequence[ScoringJob], request: ScoreRequest, rng: random.Random, vocab_size: int
) -> list[Any]:
    """Return a valid reply to a scoring request, as JSON values."""
    return [_valid_entry(asked_of(job).ids, request, rng, vocab_size) for job in jobs]


def _valid_entry(
    ids: list[int], request: ScoreRequest, rng: random.Random, vocab_size: int
) -> dict[str, Any]:
    top: list[Any] = [None]
    rows: list[Any] = [[None, ids[0], None]]
    for token in ids[1:]:
        own = -rng.expovariate(1.0)
        rows.append([own, token if token < vocab_size - 1 else rng.choice((0, token)), None])
        if isinstance(request, TopKRequest):
            others = [other for other in rng.sample(range(vocab_size), request.k) if other != token]
            above = [own * rng.random() for _ in others[: request.k - 1]]
            pairs = [[value, o, None] for value, o in zip(sorted(above, reverse=True), others)]  # noqa: B905
            top.append([*pairs, [own, token, None]])
    meta: dict[str, Any] = {
        "id": "x",
        "finish_reason": rng.choice((None, {"type": "length", "length": 0})),
        "prompt_tokens": len(ids),
        "input_token_logprobs": rows,
    }
    if isinstance(request, TopKRequest):
        meta |= _as_arrays(top, request.k) if rng.random() < 0.5 else {"input_top_logprobs": top}
    return {"text": "", "output_ids": [], "meta_info": meta}


def _as_arrays(top: list[Any], k: int) -> dict[str, Any]:
    """Return candidates as SGLang gives them in base64."""
    flat = list(chain.from_iterable(top[1:]))
    name = "input_top_logprobs"
    return {
        f"{name}_shape": [len(top) - 1, k],
        f"{name}_null_prefix": 1,
        f"{name}_val_flat_b64": _base64([value for value, _, _ in flat], "<f4"),
        f"{name}_val_flat_b64_dtype": "float32",
        f"{name}_idx_flat_b64": _base64([token for _, token, _ in flat], "<i4"),
        f"{name}_idx_flat_b64_dtype": "int32",
    }


def _base64(numbers: list[Any], dtype: str) -> str:
    return base64.b64encode(np.array(numbers, dtype=dtype).tobytes()).decode()


def _try_scores(
    raw: bytes, jobs: list[ScoringJob], request: ScoreRequest, counts: Counts, secret: str
) -> None:
    k = request.k if isinstance(request, TopKRequest) else None
    compare(
        raw,
        lambda: meaning(raw, [asked_of(job) for job in jobs], k, VOCAB),
        lambda: read_scores(raw, jobs, request, vocab_size=VOCAB, teacher_id="t"),
        counts,
        secret,
    )


def compare(
    raw: bytes,
    reference: Callable[[], Sequence[Said | None]],
    read: Callable[[], Sequence[TeacherScore | Fault]],
    counts: Counts,
    secret: str,
) -> None:
    """Read a reply with the reference and with the package; count what differs.

    Args:
        reference: raises `Odd` where the whole reply says nothing.
        read: raises `ReplyError` there.
    """
    expected: Sequence[Said | None] | None
    try:
        expected = reference()
    except Odd:
        expected = None
    try:
        found = read()
    except ReplyError as error:
        check_text(str(error), counts, secret)
        if expected is not None:
            counts.mistake(f"refused what can be read ({error}): {raw[:300]!r}")
        return
    if expected is None:
        counts.mistake(f"accepted what says nothing: {raw[:300]!r}")
        return
    for outcome, said in zip(found, expected, strict=True):
        if isinstance(outcome, Fault):
            check_text(outcome.detail, counts, secret)
        if not same(outcome, said):
            counts.mistake(f"{outcome} instead of {said}: {raw[:300]!r}")


def same(outcome: TeacherScore | Fault, said: Said | None) -> bool:
    """Whether the package read what the reference read."""
    if said is None or isinstance(outcome, Fault):
        return said is None and isinstance(outcome, Fault)
    if outcome.logprobs.tolist() != said.logprobs:
        return False
    if not isinstance(outcome, TopKScore):
        return not said.candidate_ids
    return (
        outcome.candidate_ids.tolist() == said.candidate_ids
        and outcome.candidate_logprobs.tolist() == said.candidate_logprobs
    )


def check_text(text: str, counts: Counts, secret: str) -> None:
    """Count a text that would show the key, or move a terminal's cursor."""
    if any(secret[at : at + 8] in text for at in range(len(secret) - 7)):
        counts.key_leak(text)
    if printable(text) != text or "\n" in text or len(text) > _LONGEST_DETAIL:
        counts.mistake(f"a text that is not one short printable line: {text!r}")


def _random_request(rng: random.Random) -> RolloutRequest:
    truncated = rng.random() < 0.5
    spec = SamplingSpec(
        max_new_tokens=MAX_NEW,
        temperature=1.0,
        top_p=0.9 if truncated else 1.0,
        top_k=0,
        seed=rng.getrandbits(16),
    )
    prompt = Prompt(prompt_id="p", token_ids=np.array([1, 2], dtype=np.int32))
    return RolloutRequest(rollout_id="r", prompt=prompt, sampling=spec)


def _valid_answer(request: RolloutRequest, rng: random.Random) -> list[Any]:
    ids = [rng.randrange(EOS) for _ in range(rng.randint(1, MAX_NEW))]
    if len(ids) < MAX_NEW:
        ids[-1] = EOS
    values = [-rng.expovariate(1.0) for _ in ids]
    meta: dict[str, Any] = {
        "finish_reason": {"type": "stop", "matched": EOS},
        "output_token_logprobs": [[v, t, None] for v, t in zip(values, ids, strict=True)],
    }
    if request.sampling.top_p < 1:
        meta["output_token_sampling_logprobs"] = [value / 2 for value in values]
    return [{"output_ids": ids, "meta_info": meta}]


def _try_answer(raw: bytes, request: RolloutRequest, counts: Counts, secret: str) -> None:
    version = WeightVersion(step=0, digest="d")
    expected = _answer_meaning(raw, request)
    try:
        rollout = read_answer(raw, request, frozenset({EOS}), version, vocab_size=VOCAB)
    except ReplyError as error:
        check_text(str(error), counts, secret)
        if expected is not None:
            counts.mistake(f"refused what can be read ({error}): {raw[:300]!r}")
        return
    found: Rollout = rollout
    if expected != (found.response_ids.tolist(), found.behavior_logprobs.tolist()):
        counts.mistake(f"read {found} instead of {expected}: {raw[:300]!r}")


def _answer_meaning(raw: bytes, request: RolloutRequest) -> tuple[list[int], list[float]] | None:
    """Return the ids and logprobs that an answer says; None if it is no whole answer."""
    try:
        (entry,) = json.loads(raw.decode("utf-8"))
        ids, meta = entry["output_ids"], entry["meta_info"]
        rows = meta["output_token_logprobs"]
        reason = meta.get("finish_reason")
        is_whole = (
            (reason is None or (reason["type"] in ("stop", "length") and type(reason) is dict))
            and type(ids) is list
            and all(type(token) is int and 0 <= token < VOCAB for token in ids)
            and type(rows) is list
            and all(type(row) is list and len(row) == 3 for row in rows)
            and all(row[2] is None or type(row[2]) is str for row in rows)
            and all(type(row[1]) is int for row in rows)
            and [row[1] for row in rows] == ids
            and 1 <= len(ids) <= MAX_NEW
            and EOS not in ids[:-1]
            and (ids[-1] == EOS or len(ids) == MAX_NEW)
        )
        values = [row[0] for row in rows]
        if request.sampling.top_p < 1:
            values = meta["output_token_sampling_logprobs"]
            is_whole = is_whole and type(values) is list and len(values) == len(ids)
        return (ids, [logprob(value) for value in values]) if is_whole else None
    except (Odd, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None
