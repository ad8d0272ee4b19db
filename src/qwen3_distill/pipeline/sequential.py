"""The loop: generate, score, train, publish, one after another. Strictly on-policy.

Prompt --generate--> Rollout --score--> ScoredRollout --batch--> Update --publish--+
                        ^                                                          |
                        +--------------------- load(version) <---------------------+
"""

from qwen3_distill.errors import NonFiniteError
from qwen3_distill.pipeline.build import Parts
from qwen3_distill.pipeline.recorder import Recorder, StageClock
from qwen3_distill.pipeline.requests import in_request_order, requests_for_step
from qwen3_distill.types import Batch, Rollout, RolloutRequest, RunCursor, ScoredRollout, Update


async def run_sequential(parts: Parts, recorder: Recorder, cursor: RunCursor) -> RunCursor:
    """Train from ``cursor`` to the last step, or until the recorder is asked to stop.

    The learner must stand at the cursor's weight version.

    Raises:
        NonFiniteError: a step had no finite loss or gradient; its batch is in the run folder.
    """
    config = parts.config
    await push_weights(parts)  # before the first rollout: the engine has no weights of its own
    await recorder.evaluate_if_due(cursor)
    while cursor.step < config.steps and not recorder.stop_requested:
        clock = StageClock()
        prompts = parts.prompts.take(cursor.prompts_drawn, config.prompts_per_step)
        requests = requests_for_step(config, prompts, cursor.step)
        with clock("generate"):
            rollouts = await generate(parts, requests)
        with clock("score"):
            scored = await score(parts, rollouts)
        with clock("train"):
            update = await checked_update(parts, recorder, parts.make_batch(scored))
        with clock("publish"):
            await push_weights(parts)
        cursor = RunCursor(
            step=cursor.step + 1,
            prompts_drawn=cursor.prompts_drawn + config.prompts_per_step,
            weight_version=update.version,
        )
        await recorder.after_step(cursor, scored, update, clock)
    return cursor


async def push_weights(parts: Parts) -> None:
    """Publish the learner's weights and have the engine serve them, checked by digest."""
    version = await parts.learner.publish(parts.channel)
    await parts.engine.load(version, parts.channel)


async def generate(parts: Parts, requests: list[RolloutRequest]) -> list[Rollout]:
    """All requested rollouts, in the order of the requests."""
    finished = [rollout async for rollout in parts.engine.generate(requests)]
    return in_request_order(requests, finished)


async def score(parts: Parts, rollouts: list[Rollout]) -> list[ScoredRollout]:
    """Each rollout with its own score."""
    scores = await parts.teacher.score(rollouts)
    return [
        ScoredRollout(rollout=rollout, score=score)
        for rollout, score in zip(rollouts, scores, strict=True)
    ]


async def checked_update(parts: Parts, recorder: Recorder, batch: Batch) -> Update:
    """One optimizer step; a batch without a finite gradient is saved before the error goes on."""
    try:
        return await parts.learner.update(batch)
    except NonFiniteError as error:
        path = recorder.save_failed_batch(parts.learner.version.step, batch)
        raise NonFiniteError(f"{error}. The batch is saved in {path}") from error
