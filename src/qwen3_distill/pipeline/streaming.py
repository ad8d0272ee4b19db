"""The loop without turns: rollouts run on across steps, and no stage waits for another to end.

    feed --> engine.generate --> waiting --> teacher.score --> ready --> batch --> update
     ^                                                                               |
     +------ a step's rollouts are settled: as many new ones may begin <-- publish --+

One asyncio controller. What is under way is bounded by rollouts for ``max_steps_ahead + 1``
steps, so queues need no bounds of their own. With staleness 0 the rollouts of a step begin when
the step before is done: the sequential loop, rollout for rollout.
"""

from qwen3_distill.pipeline.flow import Ready, RolloutFlow
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.recorder import Recorder
from qwen3_distill.pipeline.step import (
    needs_rollouts,
    take_step,
    traced_push,
)
from qwen3_distill.types import (
    RunCursor,
)
from qwen3_distill.utils.concurrency import TaskScope


async def run_streaming(parts: Parts, recorder: Recorder, cursor: RunCursor) -> RunCursor:
    """Train from ``cursor`` to the last step, or until the recorder is asked to stop.

    The learner must stand at the cursor's weight version.

    Raises:
        NonFiniteError: a step had no finite loss or gradient; its batch is in the run folder.
        StallError: nothing moved for ``stall_timeout_s``.
    """
    await traced_push(parts, recorder.trace)  # before the first rollout: there are no weights yet
    await recorder.evaluate_if_due(cursor)
    recorder.trace.begin_steps()
    async with TaskScope() as scope:
        flow = RolloutFlow(parts, recorder.trace, cursor, scope)
        while cursor.step < parts.config.steps:
            batch: list[Ready] | None = []
            if needs_rollouts(parts.config, cursor.step):
                batch = await flow.next_batch(lambda: recorder.stop_requested)
            if batch is None:
                break
            async with flow.paused_when_ahead():
                with recorder.trace.span("train", rollouts=len(batch)):
                    step = take_step(parts, recorder, [item.scored for item in batch])
                    update = await flow.in_time(step, "the learner's step")
            done = await flow.trained(batch, update)
            cursor = done.cursor
            await recorder.after_step(done)
            flow.go_on()
            if recorder.stop_requested:
                break
    return cursor
