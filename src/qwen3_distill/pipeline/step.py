"""The parts of a step that both loops share."""

from collections.abc import Sequence

from qwen3_distill.config import RunConfig
from qwen3_distill.errors import EngineError, NonFiniteError, WeightVersionError
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.recorder import Recorder
from qwen3_distill.pipeline.requests import in_request_order
from qwen3_distill.ports import Sampler, TeacherScorer
from qwen3_distill.recording.trace import WEIGHTS, Trace
from qwen3_distill.types import (
    Rollout,
    RolloutRequest,
    ScoredRollout,
    ScoreFailure,
    Update,
)
from qwen3_distill.weights.ipc import IpcChannel


async def traced_push(parts: Parts, trace: Trace) -> None:
    """`push_weights`, with the version that the engine serves from here on in the trace."""
    with trace.span("publish"):
        await push_weights(parts)
    version = parts.learner.version
    trace.instant(WEIGHTS, f"version {version.step}", step=version.step, digest=version.digest[:12])


async def push_weights(parts: Parts) -> None:
    """Publish the learner's weights and have the engine serve them, compared on arrival."""
    channel = parts.channel
    version = await parts.learner.publish(channel)
    try:
        await parts.engine.load(version, channel)
    except WeightVersionError:
        if not isinstance(channel, IpcChannel) or parts.config.generation.kind != "vllm":
            raise
        if not channel.failed or parts.config.generation.full_weights == "ipc":
            raise
        # CUDA IPC does not work on this machine; the channel sends files from here on.
        version = await parts.learner.publish(channel)
        await parts.engine.load(version, channel)


def max_dropped_fraction(config: RunConfig) -> float:
    """Share of a step's rollouts that may go without a score: none by an embedded teacher."""
    scoring = config.scoring
    return scoring.max_dropped_fraction if scoring.kind == "sglang" else 0.0


async def generate(engine: Sampler, requests: Sequence[RolloutRequest]) -> list[Rollout]:
    """All requested rollouts, in the order of the requests."""
    finished = [rollout async for rollout in engine.generate(requests)]
    return in_request_order(requests, finished)


async def score(
    teacher: TeacherScorer, rollouts: Sequence[Rollout], *, max_dropped_fraction: float = 0.0
) -> list[ScoredRollout]:
    """Each rollout with its own score; those that got none are left out.

    Raises:
        EngineError: more than ``max_dropped_fraction`` of them got none.
    """
    results = await teacher.score(rollouts)
    pairs = list(zip(rollouts, results, strict=True))
    scored = [
        ScoredRollout(rollout=rollout, score=result)
        for rollout, result in pairs
        if not isinstance(result, ScoreFailure)
    ]
    dropped = [result for result in results if isinstance(result, ScoreFailure)]
    if len(dropped) > max_dropped_fraction * len(rollouts):
        raise EngineError(
            f"{len(dropped)} of {len(rollouts)} rollouts got no score from {teacher.teacher_id}, "
            f"more than the {max_dropped_fraction:.0%} that may be dropped "
            f"(scoring.max_dropped_fraction); the first: {dropped[0].rollout_id}: "
            f"{dropped[0].reason}"
        )
    return scored


def needs_rollouts(config: RunConfig, step: int) -> bool:
    """Whether a step begins with new rollouts: with replay, some train on kept ones alone."""
    return config.replay is None or step % config.replay.updates_per_batch == 0


async def take_step(parts: Parts, recorder: Recorder, scored: Sequence[ScoredRollout]) -> Update:
    """One optimizer step: on these rollouts, or, with replay, on what is drawn from all kept ones.

    Raises:
        NonFiniteError: no finite gradient; the batch was saved before the error went on, unless it
            was drawn from kept rollouts.
    """
    if parts.config.replay is not None:
        if scored:
            await parts.learner.admit(scored)
        return await parts.learner.update_replayed(parts.config.rollouts_per_step)
    batch = parts.make_batch(scored)
    try:
        return await parts.learner.update(batch)
    except NonFiniteError as error:
        path = recorder.save_failed_batch(parts.learner.version.step, batch)
        raise NonFiniteError(f"{error}. The batch is saved in {path}") from error
