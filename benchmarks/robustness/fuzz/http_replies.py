"""Odd replies over real connections, to the teacher that a run uses.

A server on loopback answers scoring requests oddly (`odd_server`). A rollout must come back with
exactly the numbers that the server's healthy or changed reply says, or without a score and with a
cause that shows no key; within a second or two, and without reading more than an answer can have.
"""

import asyncio
import json
import random
import resource
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.robustness.fuzz.counts import Counts, Progress
from benchmarks.robustness.fuzz.odd_server import ODDITIES, OddServer, Reply
from benchmarks.robustness.fuzz.replies import asked_of, check_text, same
from benchmarks.robustness.fuzz.reply_meaning import Odd, meaning
from benchmarks.robustness.fuzz.watchdog import Hang, time_limit
from qwen3_distill.config import SglangScoring
from qwen3_distill.errors import DistillError
from qwen3_distill.scoring.sglang.teacher import SglangTeacher
from qwen3_distill.types import SampledRequest, ScoreFailure, ScoringJob, TokenSpan

MODEL = "models/lab/teacher"
TIMEOUT_S = 1.0
LATE_S = 3.0
"""How much later than its deadline a call may end before it counts as hanging."""
GROWTH_BYTES = 256 << 20
"""How much the process's peak memory may grow over all replies."""


def run(seed: int, count: int) -> Counts:
    """Ask for ``count`` scores, and get as many odd replies."""
    rng = random.Random(seed)
    key = f"sk-{rng.getrandbits(160):040x}"
    counts, progress = Counts(), Progress("http_replies", count)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "key"
        file.write_text(key + "\n", encoding="ascii")
        server = OddServer(_answer)
        try:
            asyncio.run(_try_all(server, str(file), key, rng, count, counts, progress))
        finally:
            server.close()
    return counts


async def _try_all(
    server: OddServer,
    key_file: str,
    key: str,
    rng: random.Random,
    count: int,
    counts: Counts,
    progress: Progress,
) -> None:
    config = SglangScoring(
        kind="sglang",
        model=MODEL,
        urls=(server.url,),
        api_key_file=key_file,
        request_timeout_s=TIMEOUT_S,
        max_attempts=1,
        readiness_tolerance_nats=1e6,  # the numbers are made up
    )
    teacher = SglangTeacher(
        config,
        request=SampledRequest(),
        memory_fraction=None,
        max_total_tokens=None,
        log=Path("unused"),
    )
    await teacher.start()
    peak_before = _peak_bytes()
    try:
        for index in range(count):
            server.rng = random.Random(rng.getrandbits(64))
            oddity = ODDITIES[index % len(ODDITIES)]
            sent: list[bytes] = []
            server.oddity = lambda reply, do=oddity, sent=sent: do(_Recorded(reply, sent))
            job = _job(rng, teacher.identity.vocab_size)
            counts.tried += 1
            name = oddity.__name__.strip("_")
            await _try_one(teacher, job, name, sent, key, counts)
            progress.show(counts)
    finally:
        await teacher.close()
    if (growth := _peak_bytes() - peak_before) > GROWTH_BYTES:
        counts.mistake(f"the process grew by {growth / 2**20:.0f} MiB")


async def _try_one(
    teacher: SglangTeacher,
    job: ScoringJob,
    name: str,
    sent: list[bytes],
    key: str,
    counts: Counts,
) -> None:
    began = time.monotonic()
    try:
        with time_limit(20.0):
            (outcome,) = await teacher.score([job])
    except DistillError as error:
        check_text(str(error), counts, key)
        return
    except Hang:
        counts.hang(name)
        return
    except Exception:  # noqa: BLE001 - what is looked for
        counts.traceback(f"{name}: {traceback.format_exc(limit=-3)}")
        return
    finally:
        if time.monotonic() - began > TIMEOUT_S + LATE_S:
            counts.hang(f"{name}: {time.monotonic() - began:.1f} s")
    if isinstance(outcome, ScoreFailure):
        check_text(outcome.reason, counts, key)
        if name in ("healthy", "more"):
            counts.mistake(f"{name}: refused: {outcome.reason}")
        return
    try:
        (said,) = meaning(sent[-1], [asked_of(job)], None, teacher.identity.vocab_size)
    except (Odd, IndexError):
        said = None
    if not same(outcome, said):
        counts.mistake(f"{name}: {outcome} instead of {said}")


class _Recorded(Reply):
    """A reply that keeps the bodies it sends with a length."""

    def __init__(self, reply: Reply, sent: list[bytes]) -> None:
        super().__init__(reply.connection, reply.head, reply.value, reply.rng)
        self._sent = sent

    def send(self, body: bytes, *headers: str, status: str = "200 OK") -> None:
        if not self._sent:  # of two replies the first one counts
            self._sent.append(body)
        super().send(body, *headers, status=status)


def _answer(request: Any) -> list[Any]:
    """Return a valid reply with made-up logprobs; those of a token are always the same."""
    return [
        {
            "output_ids": [],
            "meta_info": {
                "finish_reason": {"type": "length", "length": 0},
                "input_token_logprobs": [
                    [None if place == 0 else -(token % 97) / 7, token, None]
                    for place, token in enumerate(ids[start:])
                ],
            },
        }
        for ids, start in zip(request["input_ids"], request["logprob_start_len"], strict=True)
    ]


def _job(rng: random.Random, vocab_size: int) -> ScoringJob:
    size = rng.randint(2, 60)
    ids = np.array([rng.randrange(vocab_size - 1) for _ in range(size)], dtype=np.int32)
    span = TokenSpan(start=rng.randint(1, size - 1), stop=size)
    return ScoringJob(rollout_id=json.dumps("r"), token_ids=ids, scored=(span,))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
