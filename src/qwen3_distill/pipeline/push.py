"""Brings each step's weights to the rollout engine, before the next step or beside it.

Beside it where learner and engine have processes of their own: what is published then stays as it
is while the next step is taken (`assembly.channel`). New rollouts wait for a load under way by
themselves, and each token names the version that sampled it.
"""

import asyncio
import time

from qwen3_distill.config import StreamingPipeline
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.step import note_version, traced_push
from qwen3_distill.recording.trace import Trace
from qwen3_distill.types import Metric, WeightVersion
from qwen3_distill.utils.concurrency import TaskScope, within

_LIMIT = "(pipeline.stall_timeout_s)"
_PUBLISHED = f"the learner to publish its weights {_LIMIT}"
_SERVED = f"the engine to serve the new weights {_LIMIT}"


class WeightPush:
    """Publishes the learner's weights after a step and has the engine load them.

    The learner must take no step while `publish` or `finish` runs.

    Args:
        scope: owns a load beside a step, whose error ends the block.
    """

    def __init__(self, parts: Parts, trace: Trace, scope: TaskScope) -> None:
        pipeline = parts.config.pipeline
        assert isinstance(pipeline, StreamingPipeline)
        self._parts, self._trace, self._scope = parts, trace, scope
        self._limit_s = pipeline.stall_timeout_s
        self._may_load_beside = (
            parts.loads_beside_steps
            and parts.following is None  # its scores of the next step are the new weights'
            and parts.config.max_steps_ahead > 0
            and pipeline.weight_updates == "in_flight"
            # These ask the engine for something while a load may be under way.
            and pipeline.pause_at_ready_steps is None
            and pipeline.harvest is None
        )
        self._loaded = asyncio.Event()
        self._loaded.set()
        self._load_s: float | None = None

    async def publish(self, *, waits: bool) -> None:
        """Publish the learner's weights once the engine has loaded the last ones.

        Args:
            waits: return when the engine serves them, not before, as an evaluation needs it.

        Raises:
            StallError: it took longer than ``stall_timeout_s``.
            WeightVersionError: the engine serves other weights.
        """
        await self.finish()
        if waits or not self._may_load_beside:
            await within(self._limit_s, traced_push(self._parts, self._trace), _SERVED)
            return
        with self._trace.span("publish"):
            published = self._parts.learner.publish(self._parts.channel)
            version = await within(self._limit_s, published, _PUBLISHED)
        self._loaded.clear()
        self._scope.spawn(self._load(version), f"load {version}")

    async def finish(self) -> None:
        """Wait for the end of a load beside a step."""
        if not self._loaded.is_set():
            with self._trace.span("publish"):
                await self._loaded.wait()

    def metrics(self) -> list[Metric]:
        """Return the seconds of the last load beside a step, once."""
        load_s, self._load_s = self._load_s, None
        return [] if load_s is None else [Metric.max("weights/load_s", load_s)]

    async def _load(self, version: WeightVersion) -> None:
        """Have the engine load a version.

        It uses the transport that the run's first push has found to work: an error is one.
        """
        began = time.perf_counter()
        load = self._parts.engine.load(version, self._parts.channel)
        await within(self._limit_s, load, _SERVED)
        note_version(self._trace, version)
        self._load_s = time.perf_counter() - began
        self._loaded.set()
