"""Checks of a server at its start: does it answer, and with its model directory's scores?"""

import asyncio
from collections.abc import Callable

import numpy as np

from qwen3_distill.config import SglangScoring
from qwen3_distill.errors import EngineStartError, HandshakeError
from qwen3_distill.modeling.known_answer import KnownAnswer
from qwen3_distill.scoring.sglang.client import ServerConnection, SglangClient, backoff_s
from qwen3_distill.scoring.sglang.faults import Fault, FaultKind, Refused, ReplyError, Unanswered
from qwen3_distill.scoring.sglang.server import SglangServer
from qwen3_distill.scoring.sglang.wire import read_scores, score_body, score_reply_limit
from qwen3_distill.types import IntArray, SampledRequest, ScoringJob, TeacherScore, TokenSpan

REMOTE_GRACE_S = 10.0
"""How long a server elsewhere may refuse connections at the start."""
PROBE_PAUSE_S = 0.3
PROBE_TIMEOUT_S = 120.0
"""Timeout of one probe: the first one may compile kernels."""


async def wait_for_answer(
    client: SglangClient,
    connection: ServerConnection,
    config: SglangScoring,
    server: SglangServer | None,
) -> None:
    """Wait for a server's first answer of any kind.

    Args:
        server: the process behind the connection; None if it runs elsewhere.

    Raises:
        EngineStartError: no answer in time, or what answers is no SGLang server.
    """
    clock = asyncio.get_running_loop()
    began = clock.time()
    jobs = [_job(np.zeros(2, dtype=np.int32))]
    body = score_body(jobs, SampledRequest())
    limit = score_reply_limit(jobs, SampledRequest())
    while True:
        try:
            await client.post(
                body,
                tokens=2,
                max_bytes=limit,
                timeout_s=PROBE_TIMEOUT_S,
                connection=connection,
            )
        except Unanswered as error:
            waited_s, limit_s = clock.time() - began, config.start_timeout_s
            fault = error.fault
            unreachable = server is None and fault.kind is FaultKind.CONNECTION
            if unreachable and waited_s > min(REMOTE_GRACE_S, limit_s):
                raise EngineStartError(
                    f"no server answers ({fault.detail}); check scoring.urls, and that the server "
                    "listens on an address that can be reached from here"
                ) from error
            if waited_s > limit_s:
                raise EngineStartError(
                    "the SGLang server gave no answer within scoring.start_timeout_s="
                    f"{limit_s:g} ({fault.detail}){server.last_output() if server else ''}"
                ) from error
            await asyncio.sleep(PROBE_PAUSE_S)
        except Refused as error:
            raise EngineStartError(
                f"{error}: this is no SGLang server, or one without /generate"
            ) from error
        else:
            return


async def check_known_answer(
    client: SglangClient,
    connection: ServerConnection,
    config: SglangScoring,
    expected: KnownAnswer,
    *,
    vocab_size: int,
    count: Callable[[str], None],
) -> None:
    """Raise unless a server's scores of a known sequence are those of the directory's weights.

    Args:
        count: called with the metric key of every retry.

    Raises:
        EngineStartError: it gives no score.
        HandshakeError: it gives other scores.
    """
    job = _job(expected.token_ids)
    score: TeacherScore | Fault = Fault(FaultKind.CONNECTION, "not asked")
    for attempt in range(config.max_attempts):
        if attempt:
            await asyncio.sleep(backoff_s(attempt))
        score = await _probe(client, connection, job, vocab_size)
        if isinstance(score, TeacherScore):
            return _compare(connection, config, score, expected)
        count(f"score/retried_{score.kind.value}")
    raise EngineStartError(
        f"{connection.url} gives no score to a known sequence: {score.kind.value}: {score.detail}"
    )


def _job(token_ids: IntArray) -> ScoringJob:
    """Return the job in which all tokens but the first are scored."""
    size = int(token_ids.size)
    scored = (TokenSpan(start=1, stop=size),)
    return ScoringJob(rollout_id="a known sequence", token_ids=token_ids, scored=scored)


async def _probe(
    client: SglangClient, connection: ServerConnection, job: ScoringJob, vocab_size: int
) -> TeacherScore | Fault:
    body = score_body([job], SampledRequest())
    tokens = int(job.token_ids.size)
    try:
        reply = await client.post(
            body,
            tokens=tokens,
            max_bytes=score_reply_limit([job], SampledRequest()),
            timeout_s=PROBE_TIMEOUT_S,
            connection=connection,
        )
        (score,) = read_scores(
            reply, [job], SampledRequest(), vocab_size=vocab_size, teacher_id=connection.url
        )
    except (Unanswered, ReplyError) as error:
        return error.fault
    except Refused as error:
        return Fault(FaultKind.REFUSED, str(error))
    return score


def _compare(
    connection: ServerConnection, config: SglangScoring, score: TeacherScore, expected: KnownAnswer
) -> None:
    tolerance = config.readiness_tolerance_nats
    gap = float(np.abs(score.logprobs - expected.logprobs).mean())
    if gap <= tolerance:
        return
    shifts = [
        float(np.abs(np.roll(score.logprobs, shift) - expected.logprobs)[1:-1].mean())
        for shift in (-1, 1)
    ]
    hint = (
        "the scores fit when shifted by one token"
        if min(shifts) <= tolerance
        else "it serves another model, or in another precision"
    )
    raise HandshakeError(
        f"{connection.url} does not score as {config.model} must: on "
        f"{expected.logprobs.size} known tokens they are {gap:.3f} nats apart on average, more "
        f"than scoring.readiness_tolerance_nats={tolerance:g}. First tokens: server "
        f"{np.round(score.logprobs[:4], 2).tolist()}, directory "
        f"{np.round(expected.logprobs[:4], 2).tolist()}; {hint}"
    )
