"""The streaming loop. Generation, scoring and training overlap; a rollout may span several steps.

    feed --> engine.generate --> to score --> teacher.score --> ready --> batch --> update
     ^                                                                                |
     +------ a step's rollouts are settled, so as many may start <------- publish ----+

The engine loads what was published while the learner takes its next step, if each has a process of
its own (`push`).

One asyncio event loop runs it; `flow` has the tasks. At most the rollouts of
``max_steps_ahead + 1`` steps are in progress, so no queue needs a bound of its own. With staleness
0 a step's rollouts start when the step before is done: the same rollouts as the sequential loop.
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
    await traced_push(parts, recorder.trace)  # the engine has no weights yet
    await recorder.evaluate_if_due(cursor)
    recorder.trace.begin_steps()
    async with TaskScope() as scope:
        flow = RolloutFlow(parts, recorder.trace, cursor, scope)
        while cursor.step < parts.config.steps:
            batch: list[Ready] | None = []
            if needs_rollouts(parts.config.replay, cursor.step):
                batch = await flow.next_batch(lambda: recorder.stop_requested)
            if batch is None:
                break
            async with flow.paused_when_ahead():
                with recorder.trace.span("train", rollouts=len(batch)):
                    step = take_step(parts, recorder, [item.scored for item in batch])
                    update = await flow.within_stall_timeout(step, "the learner's step")
            done = await flow.publish_and_settle(batch, update)
            cursor = done.cursor
            await recorder.after_step(done)
            flow.allow_new_rollouts()
            if recorder.stop_requested:
                break
        await flow.push.finish()
    return cursor
