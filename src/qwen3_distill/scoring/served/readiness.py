"""Checks of a server at its start: does it answer, and with its model directory's scores?"""

import asyncio
from collections.abc import Callable

import numpy as np

from qwen3_distill.config import ServedScoring
from qwen3_distill.errors import EngineError, EngineStartError, HandshakeError
from qwen3_distill.modeling.known_answer import KnownAnswer
from qwen3_distill.scoring.served.client import ServerClient, ServerConnection, backoff_s
from qwen3_distill.scoring.served.faults import Fault, FaultKind, Refused, ReplyError, Unanswered
from qwen3_distill.scoring.served.server import EngineServer
from qwen3_distill.scoring.served.wire import Wire
from qwen3_distill.types import (
    IntArray,
    RolloutRequest,
    SampledRequest,
    ScoreRequest,
    ScoringJob,
    TeacherScore,
    TokenSpan,
    WeightVersion,
)

REMOTE_GRACE_S = 10.0
"""How long a server elsewhere may refuse connections at the start."""
PROBE_PAUSE_S = 0.3
CERTAIN_NATS = 1e-3
"""Rounding of the logprob of a token that is certain."""
PROBE_TIMEOUT_S = 120.0
"""Timeout of one probe: the first one may compile kernels."""


async def wait_for_answer(
    client: ServerClient,
    connection: ServerConnection,
    config: ServedScoring,
    server: EngineServer | None,
    *,
    wire: Wire,
    probe: ScoreRequest,
) -> None:
    """Wait for a server's first answer of any kind.

    Args:
        server: the process behind the connection; None if it runs elsewhere.
        probe: what the server is asked for.

    Raises:
        EngineStartError: no answer in time, or what answers is no such server or one that
            gives no such scores.
    """
    clock = asyncio.get_running_loop()
    began = clock.time()
    jobs = [_job(np.zeros(2, dtype=np.int32))]
    body = wire.score_body(jobs, probe)
    limit = wire.score_reply_limit(jobs, probe)
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
                    f"the {wire.engine} server gave no answer within scoring.start_timeout_s="
                    f"{limit_s:g} ({fault.detail}){server.last_output() if server else ''}"
                ) from error
            await asyncio.sleep(PROBE_PAUSE_S)
        except Refused as error:
            raise EngineStartError(
                f"{error}: this is no {wire.engine} server, or one without {wire.path}"
                + wire.remedy(probe)
            ) from error
        else:
            return


async def check_known_answer(
    client: ServerClient,
    connection: ServerConnection,
    config: ServedScoring,
    expected: KnownAnswer,
    *,
    wire: Wire,
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
        score = await _probe(client, connection, job, wire, vocab_size)
        if isinstance(score, TeacherScore):
            return _compare(connection, config, score, expected)
        count(f"score/retried_{score.kind.value}")
    raise EngineStartError(
        f"{connection.url} gives no score to a known sequence: {score.kind.value}: {score.detail}"
    )


async def check_sampling(
    client: ServerClient,
    connection: ServerConnection,
    wire: Wire,
    probe: RolloutRequest,
    eos_ids: frozenset[int],
    *,
    vocab_size: int,
    max_attempts: int,
    count: Callable[[str], None],
) -> None:
    """Raise unless a server's logprobs are those of the distribution that it samples from.

    Args:
        probe: a request whose sampled tokens all have probability 1.
        count: called with the metric key of every retry.

    Raises:
        EngineError: they are others, or there is no answer.
    """
    body = wire.answer_body(probe, eos_ids, vocab_size)
    version = WeightVersion(step=0, digest="unknown")
    fault = Fault(FaultKind.CONNECTION, "not asked")
    for attempt in range(max_attempts):
        if attempt:
            count(f"evaluate/retried_{fault.kind.value}")
            await asyncio.sleep(backoff_s(attempt))
        try:
            reply = await client.post(
                body,
                tokens=int(probe.prompt.token_ids.size),
                max_bytes=wire.answer_reply_limit(probe),
                timeout_s=PROBE_TIMEOUT_S,
                connection=connection,
            )
            answer = wire.read_answer(reply, probe, eos_ids, version, vocab_size=vocab_size)
        except (Unanswered, ReplyError) as error:
            fault = error.fault
            continue
        except Refused as error:
            raise EngineError(f"the teacher does not sample: {error}") from error
        worst = float(answer.behavior_logprobs.min())
        if worst < -CERTAIN_NATS:
            raise EngineError(
                f"{connection.url} gives other logprobs than those of the distribution that it "
                f"samples from: {worst:.2f} nats for the only token that it may sample; "
                f"{wire.sampling_remedy}"
            )
        return
    raise EngineError(f"{connection.url} does not sample: {fault.kind.value}: {fault.detail}")


def _job(token_ids: IntArray) -> ScoringJob:
    """Return the job in which all tokens but the first are scored."""
    size = int(token_ids.size)
    scored = (TokenSpan(start=1, stop=size),)
    return ScoringJob(rollout_id="a known sequence", token_ids=token_ids, scored=scored)


async def _probe(
    client: ServerClient,
    connection: ServerConnection,
    job: ScoringJob,
    wire: Wire,
    vocab_size: int,
) -> TeacherScore | Fault:
    body = wire.score_body([job], SampledRequest())
    tokens = int(job.token_ids.size)
    try:
        reply = await client.post(
            body,
            tokens=tokens,
            max_bytes=wire.score_reply_limit([job], SampledRequest()),
            timeout_s=PROBE_TIMEOUT_S,
            connection=connection,
        )
        (score,) = wire.read_scores(
            reply, [job], SampledRequest(), vocab_size=vocab_size, teacher_id=connection.url
        )
    except (Unanswered, ReplyError) as error:
        return error.fault
    except Refused as error:
        return Fault(FaultKind.REFUSED, str(error))
    return score


def _compare(
    connection: ServerConnection, config: ServedScoring, score: TeacherScore, expected: KnownAnswer
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
