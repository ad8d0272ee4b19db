"""Brings each step's weights to the rollout engine, before the next step or beside it.

Beside it where the engine has a process of its own: what is published then stays as it is while the
next step is taken (`assembly.channel`), and the learner waits for its own part only. Rollouts wait
for a load under way by themselves, and each token names the version that sampled it.
"""

import asyncio
import time

from qwen3_distill.config import StreamingPipeline
from qwen3_distill.errors import WeightVersionError
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.step import note_version, traced_push
from qwen3_distill.recording.trace import Trace
from qwen3_distill.types import Metric, WeightVersion
from qwen3_distill.utils.concurrency import TaskScope, within

_WHAT = "the engine to serve the new weights (pipeline.stall_timeout_s)"


class WeightPush:
    """Publishes the learner's weights after a step and has the engine load them.

    Args:
        scope: owns a load beside a step, whose error ends the block.
    """

    def __init__(self, parts: Parts, trace: Trace, scope: TaskScope) -> None:
        pipeline = parts.config.pipeline
        assert isinstance(pipeline, StreamingPipeline)
        self._parts, self._trace, self._scope = parts, trace, scope
        self._limit_s = pipeline.stall_timeout_s
        self._may_load_beside = (
            parts.channel.reach != "process"
            and parts.following is None  # its scores of the next step are the new weights'
            and parts.config.max_steps_ahead > 0
            and pipeline.weight_updates == "in_flight"
        )
        self._loaded = asyncio.Event()
        self._loaded.set()
        self._publishes_again = False
        """The last load found that the channel must use another transport."""
        self._load_s: float | None = None

    async def push(self, *, waits: bool) -> None:
        """Publish the learner's weights; the learner must take no step meanwhile.

        Args:
            waits: return when the engine serves them, not before, as an evaluation needs it.

        Raises:
            StallError: it took longer than ``stall_timeout_s``.
        """
        await self.finish()
        if waits or not self._may_load_beside:
            await within(self._limit_s, traced_push(self._parts, self._trace), _WHAT)
            return
        with self._trace.span("publish"):
            published = self._parts.learner.publish(self._parts.channel)
            version = await within(self._limit_s, published, _WHAT)
        self._loaded.clear()
        self._scope.spawn(self._load(version), f"load {version}")

    async def finish(self) -> None:
        """Wait until the engine serves what was published; the learner must take no step meanwhile.

        Raises:
            WeightVersionError: it serves other weights.
        """
        await self._loaded.wait()
        if self._publishes_again:
            self._publishes_again = False
            await within(self._limit_s, traced_push(self._parts, self._trace), _WHAT)

    async def loaded(self) -> None:
        """Wait for the end of a load beside a step, also during a step."""
        await self._loaded.wait()

    def metrics(self) -> list[Metric]:
        """Return the seconds of the last load beside a step, once."""
        load_s, self._load_s = self._load_s, None
        return [] if load_s is None else [Metric.max("weights/load_s", load_s)]

    async def _load(self, version: WeightVersion) -> None:
        began = time.perf_counter()
        try:
            load = self._parts.engine.load(version, self._parts.channel)
            await within(self._limit_s, load, _WHAT)
        except WeightVersionError:
            if not self._parts.channel.switched_transport(version):
                raise
            self._publishes_again = True
        else:
            note_version(self._trace, version)
            self._load_s = time.perf_counter() - began
        self._loaded.set()
