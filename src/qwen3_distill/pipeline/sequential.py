"""The loop: generate, score, train, publish, one after another. Strictly on-policy.

Prompt --generate--> Rollout --score--> ScoredRollout --batch--> Update --publish--+
                        ^                                                          |
                        +--------------------- load(version) <---------------------+
"""

from collections.abc import Sequence

from qwen3_distill.config import RunConfig
from qwen3_distill.errors import EngineError, NonFiniteError, WeightVersionError
from qwen3_distill.pipeline.assembly.engines import Parts
from qwen3_distill.pipeline.recorder import Ledger, Recorder, StepRecord, ledger_entry
from qwen3_distill.pipeline.requests import in_request_order, requests_for_step
from qwen3_distill.ports import Sampler, TeacherScorer
from qwen3_distill.recording.trace import WEIGHTS, Trace
from qwen3_distill.scoring.views import TeacherView
from qwen3_distill.types import (
    Metric,
    Rollout,
    RolloutRequest,
    RunCursor,
    ScoredRollout,
    ScoreFailure,
    Update,
)


async def run_sequential(parts: Parts, recorder: Recorder, cursor: RunCursor) -> RunCursor:
    """Train from ``cursor`` to the last step, or until the recorder is asked to stop.

    The learner must stand at the cursor's weight version.

    Raises:
        NonFiniteError: a step had no finite loss or gradient; its batch is in the run folder.
    """
    config = parts.config
    trace = recorder.trace
    await traced_push(parts, trace)  # before the first rollout: the engine has no weights yet
    await recorder.evaluate_if_due(cursor)
    trace.begin_steps()
    while cursor.step < config.steps and not recorder.stop_requested:
        rollouts, scored = list[Rollout](), list[ScoredRollout]()
        drawn = cursor.prompts_drawn
        if needs_rollouts(config, cursor.step):
            prompts = parts.prompts.take(drawn, config.prompts_per_step)
            requests = requests_for_step(config, prompts, drawn // config.prompts_per_step)
            with trace.span("generate", rollouts=len(requests)):
                rollouts = await generate(parts.engine, requests)
            with trace.span("score", rollouts=len(rollouts)):
                scored = await score(parts.teacher, parts.view, rollouts)
            drawn += config.prompts_per_step
        with trace.span("train", rollouts=len(scored)):
            update = await take_step(parts, recorder, scored)
        await traced_push(parts, trace)
        first = cursor.prompts_drawn * config.samples_per_prompt
        cursor = RunCursor(step=cursor.step + 1, prompts_drawn=drawn, weight_version=update.version)
        await recorder.after_step(
            StepRecord(
                cursor=cursor,
                scored=scored,
                update=update,
                metrics=[Metric.sum("score/dropped_rollouts", len(rollouts) - len(scored))],
                ledger=_ledger(rollouts, scored, first),
            )
        )
    return cursor


def _ledger(rollouts: Sequence[Rollout], scored: Sequence[ScoredRollout], first: int) -> Ledger:
    """Of a step whose rollouts, in the order of their requests, have numbers from ``first`` on."""
    kept = {item.rollout.rollout_id for item in scored}
    numbered = list(enumerate(rollouts, first))
    trained = [ledger_entry(n, r) for n, r in numbered if r.rollout_id in kept]
    dropped = [f"{ledger_entry(n, r)}:no-score" for n, r in numbered if r.rollout_id not in kept]
    return Ledger(trained=" ".join(trained), dropped=" ".join(dropped))


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
        if not channel.switched_transport(version):
            raise
        version = await parts.learner.publish(channel)
        await parts.engine.load(version, channel)


async def generate(engine: Sampler, requests: Sequence[RolloutRequest]) -> list[Rollout]:
    """All requested rollouts, in the order of the requests."""
    finished = [rollout async for rollout in engine.generate(requests)]
    return in_request_order(requests, finished)


async def score(
    teacher: TeacherScorer, view: TeacherView, rollouts: Sequence[Rollout]
) -> list[ScoredRollout]:
    """Each rollout with its own score; those that got none are left out.

    Raises:
        EngineError: more than the teacher's ``max_dropped_fraction`` of them got none.
    """
    results = await teacher.score([view.job(rollout) for rollout in rollouts])
    outcomes = [view.scored(r, result) for r, result in zip(rollouts, results, strict=True)]
    scored = [outcome for outcome in outcomes if isinstance(outcome, ScoredRollout)]
    dropped = [outcome for outcome in outcomes if isinstance(outcome, ScoreFailure)]
    if len(dropped) > teacher.max_dropped_fraction * len(rollouts):
        raise EngineError(
            f"{len(dropped)} of {len(rollouts)} rollouts got no score from {teacher.teacher_id}, "
            f"more than the {teacher.max_dropped_fraction:.0%} that may be dropped "
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
