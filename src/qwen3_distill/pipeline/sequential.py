"""The sequential loop: generate, score, train, publish, one after another. Strictly on-policy.

Prompt --generate--> Rollout --score--> ScoredRollout --batch--> Update --publish--+
                        ^                                                          |
                        +--------------------- load(version) <---------------------+
"""

from collections.abc import Sequence

from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.recorder import Ledger, Recorder, StepRecord, ledger_entry
from qwen3_distill.pipeline.requests import requests_for_step
from qwen3_distill.pipeline.step import (
    context_metrics,
    needs_new_weights,
    needs_rollouts,
    ready_to_train,
    sample,
    take_step,
    traced_push,
)
from qwen3_distill.types import (
    Metric,
    Rollout,
    RunCursor,
    TrainingRollout,
)


async def run_sequential(parts: Parts, recorder: Recorder, cursor: RunCursor) -> RunCursor:
    """Train from ``cursor`` to the last step, or until the recorder is asked to stop.

    The learner must stand at the cursor's weight version.

    Raises:
        NonFiniteError: a step had no finite loss or gradient; its batch is in the run folder.
    """
    config = parts.config
    trace = recorder.trace
    await traced_push(parts, trace)  # the engine has no weights yet
    await recorder.evaluate_if_due(cursor)
    trace.begin_steps()
    while cursor.step < config.steps and not recorder.stop_requested:
        rollouts, scored = list[Rollout](), list[TrainingRollout]()
        drawn = cursor.prompts_drawn
        if needs_rollouts(config.replay, cursor.step):
            prompts = parts.prompts.take(drawn, config.prompts_per_step)
            requests = requests_for_step(config, prompts, drawn // config.prompts_per_step)
            number = drawn * config.samples_per_prompt
            with trace.span("generate", rollouts=len(requests)):
                rollouts = await sample(
                    config, parts.engine, parts.teacher_rollouts, requests, number
                )
            parts.begin_checks(rollouts)
            with trace.span("score", rollouts=len(rollouts)):
                scored = await ready_to_train(parts, rollouts)
            drawn += config.prompts_per_step
        with trace.span("train", rollouts=len(scored)):
            update = await take_step(parts, recorder, scored)
        if needs_new_weights(config, cursor.step + 1):
            await traced_push(parts, trace)
        first = cursor.prompts_drawn * config.samples_per_prompt
        cursor = RunCursor(step=cursor.step + 1, prompts_drawn=drawn, weight_version=update.version)
        await recorder.after_step(
            StepRecord(
                cursor=cursor,
                scored=scored,
                update=update,
                metrics=[
                    Metric.sum("score/dropped_rollouts", len(rollouts) - len(scored)),
                    *await context_metrics(parts, trace, cursor.step, scored),
                ],
                ledger=_ledger(rollouts, scored, first),
            )
        )
    return cursor


def _ledger(rollouts: Sequence[Rollout], scored: Sequence[TrainingRollout], first: int) -> Ledger:
    """Build a step's ledger; its rollouts, in request order, are numbered from ``first``."""
    kept = {item.rollout.rollout_id for item in scored}
    numbered = list(enumerate(rollouts, first))
    trained = [ledger_entry(n, r) for n, r in numbered if r.rollout_id in kept]
    dropped = [f"{ledger_entry(n, r)}:no-score" for n, r in numbered if r.rollout_id not in kept]
    return Ledger(trained=" ".join(trained), dropped=" ".join(dropped))
