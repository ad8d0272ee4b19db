"""One step's actions, shared by both loops: generate, score, train, push weights."""

from collections.abc import Sequence

from qwen3_distill.config import ReplayConfig, RunConfig
from qwen3_distill.errors import EngineError, NonFiniteError, WeightVersionError
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.recorder import Recorder
from qwen3_distill.pipeline.requests import in_request_order, is_teachers
from qwen3_distill.ports import Sampler, TeacherScorer
from qwen3_distill.recording.trace import WEIGHTS, Trace
from qwen3_distill.scoring.by_tag import teacher_id_for
from qwen3_distill.scoring.views import TeacherView
from qwen3_distill.types import (
    AlignedRollout,
    Metric,
    Rollout,
    RolloutRequest,
    ScoredRollout,
    ScoreFailure,
    ScoringJob,
    TrainingRollout,
    UnalignedRollout,
    Update,
    WeightVersion,
)
from qwen3_distill.utils.concurrency import together


async def traced_push(parts: Parts, trace: Trace) -> None:
    """`push_weights`, and note in the trace which version the engine serves from now on."""
    with trace.span("publish"):
        await push_weights(parts)
    note_version(trace, parts.learner.version)


def note_version(trace: Trace, version: WeightVersion) -> None:
    """Note in the trace that the engine serves a version from now on."""
    trace.instant(WEIGHTS, f"version {version.step}", step=version.step, digest=version.digest[:12])


async def push_weights(parts: Parts) -> None:
    """Publish the learner's weights and load them into the engine, which compares their digest.

    Both happen twice where the channel had to switch to another transport. A teacher that follows
    the student takes the same weights.
    """
    version = await parts.learner.publish(parts.channel)
    try:
        await parts.engine.load(version, parts.channel)
    except WeightVersionError:
        if not parts.channel.switched_transport(version):
            raise
        version = await parts.learner.publish(parts.channel)
        await parts.engine.load(version, parts.channel)
    if parts.following is not None:
        await parts.following.follow(version, parts.channel)


async def context_metrics(
    parts: Parts, trace: Trace, step: int, scored: Sequence[TrainingRollout]
) -> list[Metric]:
    """Measure what the teacher's context tells it, on rollouts of a finished step, if that is due.

    Args:
        step: finished steps.
    """
    if not parts.compares_context(step):
        return []
    assert parts.comparison is not None
    assert parts.scorer is not None
    with trace.span("score", "context"):
        rollouts = [item.rollout for item in scored]
        return await parts.comparison.metrics(parts.scorer, rollouts)


async def generate(engine: Sampler, requests: Sequence[RolloutRequest]) -> list[Rollout]:
    """Sample all requests; return the rollouts in the order of the requests."""
    finished = [rollout async for rollout in engine.generate(requests)]
    return in_request_order(requests, finished)


async def sample(
    config: RunConfig,
    student: Sampler | None,
    teacher: Sampler | None,
    requests: Sequence[RolloutRequest],
    first: int,
) -> list[Rollout]:
    """Sample a step's requests, each from the model that the config names for it.

    Args:
        student: needed if the student samples any of them; `teacher` likewise.
        first: number of the first request; the others follow.

    Returns:
        The rollouts in the order of the requests.
    """
    parts: dict[bool, list[RolloutRequest]] = {False: [], True: []}
    for number, request in enumerate(requests, first):
        parts[is_teachers(config, number)].append(request)
    work = [
        generate(_required(sampler), part)
        for sampler, part in ((student, parts[False]), (teacher, parts[True]))
        if part
    ]
    return in_request_order(requests, [r for found in await together(*work) for r in found])


def _required(sampler: Sampler | None) -> Sampler:
    assert sampler is not None, "assembly builds every sampler that the config names"
    return sampler


def sampler_of(parts: Parts, number: int) -> Sampler:
    """Return what samples rollout ``number``: the rollout engine, or the teacher."""
    return _required(parts.teacher_rollouts if is_teachers(parts.config, number) else parts.engine)


async def training_rollouts(
    parts: Parts, rollouts: Sequence[Rollout]
) -> list[TrainingRollout | ScoreFailure]:
    """Return each rollout ready to train on, or why it is not: with a score if one is needed."""
    if parts.scorer is None:
        return [TrainingRollout(rollout=rollout) for rollout in rollouts]
    return [*await score_each(parts.scorer, parts.view, rollouts)]


async def ready_to_train(parts: Parts, rollouts: Sequence[Rollout]) -> list[TrainingRollout]:
    """Return the rollouts to train on; leave out those that need a score and got none.

    Raises:
        EngineError: see `score`.
    """
    if parts.scorer is None:
        return [TrainingRollout(rollout=rollout) for rollout in rollouts]
    return [*await score(parts.scorer, parts.view, rollouts)]


async def score_each(
    teacher: TeacherScorer, view: TeacherView, rollouts: Sequence[Rollout]
) -> list[ScoredRollout | AlignedRollout | ScoreFailure]:
    """Score rollouts; return each one scored, or why it is not, in the order given."""
    asked = view.jobs(rollouts)
    jobs = [job for job in asked if isinstance(job, ScoringJob)]
    answers = iter(await teacher.score(jobs) if jobs else [])
    results = [next(answers) if isinstance(job, ScoringJob) else job for job in asked]
    return [view.scored(rollout, result) for rollout, result in zip(rollouts, results, strict=True)]


async def score(
    teacher: TeacherScorer, view: TeacherView, rollouts: Sequence[Rollout]
) -> list[ScoredRollout | AlignedRollout]:
    """Score rollouts; leave out those without a score.

    Raises:
        EngineError: more than the teacher's ``max_dropped_fraction`` of them have none, or none of
            them can be aligned with the teacher's tokens.
    """
    results = await score_each(teacher, view, rollouts)
    unaligned = [result for result in results if isinstance(result, UnalignedRollout)]
    if unaligned and len(unaligned) == len(rollouts):
        raise EngineError(none_aligned(len(rollouts), unaligned[0].reason))
    failed = [result for result in results if isinstance(result, ScoreFailure)]
    failures = [result for result in failed if not isinstance(result, UnalignedRollout)]
    # Each of several teachers by itself: else all rollouts of one could be dropped.
    for teacher_id, rollout_ids in _by_teacher(teacher, rollouts).items():
        dropped = [failure for failure in failures if failure.rollout_id in rollout_ids]
        if len(dropped) > teacher.max_dropped_fraction * len(rollout_ids):
            raise EngineError(
                f"{len(dropped)} of {len(rollout_ids)} rollouts got no score from "
                f"{teacher_id}, more than the {teacher.max_dropped_fraction:.0%} that may "
                f"be dropped (scoring.max_dropped_fraction); the first: {dropped[0].rollout_id}: "
                f"{dropped[0].reason}"
            )
    return [result for result in results if not isinstance(result, ScoreFailure)]


def none_aligned(num_rollouts: int, reason: str) -> str:
    """Describe a step of which no rollout could be aligned with the teacher's tokens."""
    return (
        f"none of {num_rollouts} rollouts can be aligned with the teacher's tokens, so there is "
        f"nothing to train on; the first: {reason}. See the mapping of special tokens that "
        "`qwen3-distill config check` lists, and scoring.special_tokens"
    )


def _by_teacher(teacher: TeacherScorer, rollouts: Sequence[Rollout]) -> dict[str, list[str]]:
    """Group the rollouts' ids by the id of the teacher that must score them."""
    groups: dict[str, list[str]] = {}
    for rollout in rollouts:
        groups.setdefault(teacher_id_for(teacher, rollout), []).append(rollout.rollout_id)
    return groups


def needs_rollouts(replay: ReplayConfig | None, step: int) -> bool:
    """Whether a step needs new rollouts: with replay, some steps train on kept ones alone."""
    return replay is None or step % replay.updates_per_batch == 0


def is_evaluated_after(config: RunConfig, step: int) -> bool:
    """Whether an evaluation follows this step."""
    return config.evaluation is not None and config.evaluation.is_due(step, config.steps)


def needs_new_weights(config: RunConfig, step: int) -> bool:
    """Whether anything samples from the student after this step: rollouts, or an evaluation."""
    samples = "student" in config.rollouts.samplers and config.pipeline.kind != "offline"
    return samples or is_evaluated_after(config, step)


async def take_step(parts: Parts, recorder: Recorder, scored: Sequence[TrainingRollout]) -> Update:
    """Take one optimizer step: on ``scored``, or with replay on a draw from all kept rollouts.

    Raises:
        NonFiniteError: the loss, the gradient or the new weights are not finite. A batch that was
            not drawn from kept rollouts is in the run folder.
    """
    parts.begin_checks([item.rollout for item in scored])
    if parts.config.replay is not None:
        if scored:
            kept = [item for item in scored if isinstance(item, ScoredRollout)]
            assert len(kept) == len(scored), "replay needs an objective with scores"
            await parts.learner.admit(kept)
        return await parts.learner.update_replayed(parts.config.rollouts_per_step)
    batch = parts.make_batch(scored)
    try:
        return await parts.learner.update(batch)
    except NonFiniteError as error:
        path = recorder.save_failed_batch(parts.learner.version.step, batch)
        raise NonFiniteError(f"{error}. The batch is saved in {path}") from error
