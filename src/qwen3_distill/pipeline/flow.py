"""Rollouts on their way to the learner."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qwen3_distill.config import Harvest, StreamingPipeline
from qwen3_distill.errors import EngineError, StallError
from qwen3_distill.pipeline.drops import Cause, Drops
from qwen3_distill.pipeline.harvest import harvested, remainder
from qwen3_distill.pipeline.in_progress import Outstanding
from qwen3_distill.pipeline.notification import Notification
from qwen3_distill.pipeline.parts import Parts, task_reward_weight
from qwen3_distill.pipeline.recorder import Ledger, StepRecord, ledger_entry
from qwen3_distill.pipeline.requests import is_full_length, request_number, shortened
from qwen3_distill.pipeline.step import (
    max_dropped_fraction,
    needs_rollouts,
    traced_push,
)
from qwen3_distill.recording.trace import Trace
from qwen3_distill.types import (
    FinishReason,
    Metric,
    Rollout,
    RolloutPrefix,
    RolloutRequest,
    RunCursor,
    ScoredRollout,
    ScoreFailure,
    Update,
)
from qwen3_distill.utils.concurrency import TaskScope, within

Result = TypeVar("Result")

_STOP_CHECK_S = 0.5
"""A signal handler cannot wake the loop that waits for a batch: it looks this often."""


@dataclass(frozen=True)
class Ready:
    """A scored rollout, or piece of one, and the number of the rollout."""

    number: int
    scored: ScoredRollout

    @property
    def rollout(self) -> Rollout:
        return self.scored.rollout

    @property
    def is_last(self) -> bool:
        """Whether nothing of the rollout comes after it."""
        return self.rollout.finish_reason is not FinishReason.HARVESTED


class RolloutFlow:
    """Rollouts on their way to the learner: feeds the engine and the teacher, and keeps count.

    Its tasks belong to ``scope``.
    """

    def __init__(self, parts: Parts, trace: Trace, cursor: RunCursor, scope: TaskScope) -> None:
        pipeline = parts.config.pipeline
        assert isinstance(pipeline, StreamingPipeline)
        self._parts, self._config, self._pipeline = parts, parts.config, pipeline
        self._trace, self._scope = trace, scope
        self.cursor = cursor
        self._outstanding = Outstanding(cursor, samples_per_prompt=self._config.samples_per_prompt)
        self._running: dict[int, RolloutRequest] = {}
        """By number: rollouts that the engine has."""
        self._waiting: deque[tuple[int, Rollout]] = deque()
        """For the teacher."""
        self._num_scoring = 0
        self._ready: list[Ready] = []
        self._harvested_to: dict[int, int] = {}
        """By number of a running rollout: response tokens that its pieces hold."""
        self._drops = Drops()
        self._moved = Notification()
        """Rung when a rollout finishes, is scored, dropped or settled."""
        self._has_waiting = Notification()
        self._generating: contextlib.ExitStack | None = None
        """The trace's span while any rollout runs."""
        self._holds_back = False
        """No rollout is begun: others must end first, or a step must."""
        self._is_paused = False
        self._step_began = time.monotonic()
        scope.spawn(self._feed(), "feed")
        for index in range(pipeline.scoring_calls):
            scope.spawn(self._score(), f"score-{index}")

    async def in_time(self, work: Awaitable[Result], what: str) -> Result:
        """`within` the time that nothing may move for."""
        limit_s = self._pipeline.stall_timeout_s
        return await within(limit_s, work, f"{what} (pipeline.stall_timeout_s)")

    # --- Generate -------------------------------------------------------------------------------

    async def _feed(self) -> None:
        """Keep the engine as full as the window and the limit in flight allow."""
        while True:
            numbers = [] if self._holds_back else self._outstanding.ask(self._room())
            if numbers:
                requests = [self._request(number) for number in numbers]
                self._running.update(zip(numbers, requests, strict=True))
                self._count()
                self._scope.spawn(self._follow(numbers, requests), f"rollouts from {numbers[0]}")
            await self._moved.wait()

    def _room(self) -> int:
        """How many rollouts may begin.

        With replay, steps that train on kept rollouts alone count as steps ahead and need none:
        what begins now ages by them.
        """
        config = self._config
        first, beyond = self.cursor.step, self.cursor.step + config.max_steps_ahead + 1
        batches_ahead = sum(
            needs_rollouts(config, step) for step in range(first, min(beyond, config.steps))
        )
        begun = len(self._outstanding) - self._outstanding.num_waiting
        window = batches_ahead * config.rollouts_per_step - begun
        return max(0, min(window, config.max_in_flight - len(self._running)))

    def _request(self, number: int) -> RolloutRequest:
        (prompt,) = self._parts.prompts.take(number // self._config.samples_per_prompt, 1)
        return shortened(self._config, request_number(self._config, prompt, number), number)

    async def _follow(self, numbers: Sequence[int], requests: Sequence[RolloutRequest]) -> None:
        """Pass rollouts on as they finish."""
        number_of = {r.rollout_id: n for n, r in zip(numbers, requests, strict=True)}
        async for rollout in self._parts.engine.generate(requests):
            self._finish(number_of.pop(rollout.rollout_id), rollout)
        if number_of:
            raise EngineError(f"the rollout engine ended without {sorted(number_of)}")

    def _finish(self, number: int, rollout: Rollout) -> None:
        del self._running[number]
        rest = remainder(rollout, self._harvested_to.pop(number, 0))
        if rest is None:
            self._outstanding.settle([number])
        else:
            self._pass_on(number, rest)
        self._count()
        self._moved.ring()

    def _pass_on(self, number: int, rollout: Rollout) -> None:
        self._waiting.append((number, rollout))
        self._has_waiting.ring()

    # --- Score ----------------------------------------------------------------------------------

    async def _score(self) -> None:
        """Have everything that waits scored, in one call, over and over."""
        while True:
            while not self._waiting:
                await self._has_waiting.wait()
            taken = sorted(self._waiting, key=lambda item: item[0])
            self._waiting.clear()
            self._num_scoring += len(taken)
            self._count()
            with self._trace.span("score", rollouts=len(taken)):
                scores = self._parts.teacher.score([rollout for _, rollout in taken])
                what = f"the teacher's scores of {len(taken)} rollouts"
                results = await self.in_time(scores, what)
            for (number, rollout), result in zip(taken, results, strict=True):
                if isinstance(result, ScoreFailure):
                    self._drop(number, rollout, "no score", result.reason)
                else:
                    scored = ScoredRollout(rollout=rollout, score=result)
                    self._ready.append(Ready(number, scored))
            self._num_scoring -= len(taken)
            self._count()
            self._moved.ring()

    def _drop(self, number: int, rollout: Rollout, cause: Cause, detail: str = "") -> None:
        self._drops.add(number, rollout, cause, detail)
        if rollout.finish_reason is not FinishReason.HARVESTED:
            self._outstanding.settle([number])
        self._check_drops()

    def _check_drops(self) -> None:
        allowed = max_dropped_fraction(self._config) * self._config.rollouts_per_step
        failed = self._drops.count("no score")
        if failed > allowed:
            raise EngineError(
                f"{failed} rollouts got no score from {self._parts.teacher.teacher_id} within one "
                f"step, more than the {allowed:.0f} that may be dropped "
                f"(scoring.max_dropped_fraction); the last: {self._drops.detail}"
            )

    # --- Batch ----------------------------------------------------------------------------------

    async def next_batch(self, should_stop: Callable[[], bool]) -> list[Ready] | None:
        """A step's rollouts, oldest numbers first; None when asked to stop before it was full."""
        self._step_began = time.monotonic()
        harvest = self._pipeline.harvest
        harvested_ids: set[str] | None = None
        progress = time.monotonic()
        while not should_stop():
            self._drop_stale()
            batch = self._full_batch()
            if batch is None and harvest is not None and self._is_late(harvest):
                if harvested_ids is None:
                    harvested_ids = await self._harvest(harvest)
                elif not self._has_unscored(harvested_ids):
                    batch = self._take(self._ready[: self._config.rollouts_per_step]) or None
                    harvested_ids = None
            if batch is not None:
                return batch
            if await self._moved.wait(_STOP_CHECK_S):
                progress = time.monotonic()
            self._check_progress(time.monotonic() - progress)
        return None

    def _full_batch(self) -> list[Ready] | None:
        self._ready.sort(key=lambda item: (item.number, item.rollout.continues_at))
        size, samples = self._config.rollouts_per_step, self._config.samples_per_prompt
        compares = task_reward_weight(self._config) > 0
        ready = self._whole_groups() if compares else self._ready
        if len(ready) < size and not (ready and self._ends_with_fewer()):
            return None
        return self._take(whole_prompts(ready, size, samples) if compares else ready[:size])

    def _whole_groups(self) -> list[Ready]:
        """What is ready of prompts all of whose samples are ready, or dropped: reward baselines."""
        numbers = {item.number for item in self._ready}
        samples = self._config.samples_per_prompt
        missing = {n // samples for n in self._outstanding.numbers() - numbers}
        return [item for item in self._ready if item.number // samples not in missing]

    def _ends_with_fewer(self) -> bool:
        """Whether nothing more can come for this step: what the window allows is all here."""
        return not (
            self._running
            or self._waiting
            or self._num_scoring
            or self._outstanding.num_waiting
            or self._room() >= self._config.samples_per_prompt
        )

    def _take(self, chosen: Sequence[Ready]) -> list[Ready]:
        taken = list(chosen)
        kept = {id(item) for item in taken}
        self._ready = [item for item in self._ready if id(item) not in kept]
        self._count()
        return taken

    def _drop_stale(self) -> None:
        """Drop what is too old to be trained on in the coming step."""
        limit = self.cursor.step - self._pipeline.max_staleness_steps
        fresh: list[Ready] = []
        for item in self._ready:
            if item.rollout.oldest_version.step < limit:
                self._drop(item.number, item.rollout, "stale")
            else:
                fresh.append(item)
        if len(fresh) < len(self._ready):
            self._ready = fresh
            self._moved.ring()

    def _check_progress(self, stalled_s: float) -> None:
        if stalled_s > self._pipeline.stall_timeout_s:
            raise StallError(
                f"step {self.cursor.step}: nothing moved for {stalled_s:.0f} s "
                f"(pipeline.stall_timeout_s): {len(self._running)} rollouts are being sampled, "
                f"{len(self._waiting)} wait for the teacher, {self._num_scoring} are being scored, "
                f"{len(self._ready)} of {self._config.rollouts_per_step} are ready. The engines' "
                "logs are in the run folder"
            )

    # --- Harvest --------------------------------------------------------------------------------

    def _is_late(self, harvest: Harvest) -> bool:
        return time.monotonic() - self._step_began >= harvest.deadline_s

    async def _harvest(self, harvest: Harvest) -> set[str]:
        """Pass on what running rollouts have sampled since they were harvested last; its ids."""
        numbers = {request.rollout_id: n for n, request in self._running.items()}
        prefixes = await self.in_time(self._parts.engine.prefixes(), "what runs, for a harvest")
        pieces: set[str] = set()
        for prefix in prefixes:
            number = numbers.get(prefix.request.rollout_id)
            if number is None or number not in self._running:
                continue  # an evaluation's, or it has finished meanwhile
            if is_full_length(self._config, number, harvest.full_length_fraction):
                continue
            piece = self._new_tokens(number, prefix, harvest.min_tokens)
            if piece is not None:
                pieces.add(piece.rollout_id)
                self._pass_on(number, piece)
        self._trace.instant("generate", "harvest", pieces=len(pieces))
        return pieces

    def _new_tokens(self, number: int, prefix: RolloutPrefix, min_tokens: int) -> Rollout | None:
        start, stop = self._harvested_to.get(number, 0), prefix.response_ids.size
        if stop - start < min_tokens:
            return None
        self._harvested_to[number] = stop
        return harvested(prefix, start)

    def _has_unscored(self, rollout_ids: set[str]) -> bool:
        waiting = {rollout.rollout_id for _, rollout in self._waiting}
        return bool(self._num_scoring or waiting & rollout_ids)

    # --- Train ----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def paused_when_ahead(self) -> AsyncIterator[None]:
        """Around a step of the learner: decoding pauses when it has done enough for the next ones.

        It then goes on with all the rollouts it had, instead of decoding the last of them in a
        batch that runs empty and takes the device from the learner.
        """
        steps = self._pipeline.pause_at_ready_steps
        if steps is None:
            yield
            return
        wanted = steps * self._config.rollouts_per_step
        pausing = asyncio.create_task(self._pause_when_ready(wanted), name="pause")
        try:
            yield
        finally:
            pausing.cancel()
            await asyncio.wait([pausing])
            if not pausing.cancelled():
                pausing.result()  # an engine that is lost

    async def _pause_when_ready(self, num_rollouts: int) -> None:
        """Pause once so many have ended; until cancelled."""
        while self._num_unscored + len(self._ready) < num_rollouts:
            await self._moved.wait()
        self._is_paused = True
        self._count()
        pause = asyncio.ensure_future(self._parts.engine.pause())
        try:
            await asyncio.shield(pause)
            await asyncio.Event().wait()
        finally:
            await pause
            await self._parts.engine.resume()
            self._is_paused = False
            self._count()

    # --- Publish --------------------------------------------------------------------------------

    async def trained(self, batch: Sequence[Ready], update: Update) -> StepRecord:
        """Bring the new weights into use, and let new rollouts take the places of the batch's."""
        self._holds_back = self._config.max_steps_ahead == 0
        if self._pipeline.weight_updates == "boundary":
            await self._drain()
        push = traced_push(self._parts, self._trace)
        await self.in_time(push, "the engine to serve the new weights")
        for item in batch:
            if not item.is_last:
                self._outstanding.harvest(item.number)
        ages = [self.cursor.step - item.rollout.oldest_version.step for item in batch]
        self._outstanding.settle(item.number for item in batch if item.is_last)
        self.cursor = RunCursor(
            step=self.cursor.step + 1,
            prompts_drawn=self._outstanding.prompts_drawn,
            weight_version=update.version,
            outstanding=self._outstanding.to_resume(),
        )
        drops, self._drops = self._drops, Drops()
        if self._config.max_steps_ahead > 0:
            self.go_on()
        return StepRecord(
            cursor=self.cursor,
            scored=[item.scored for item in batch],
            update=update,
            metrics=[
                Metric.mean("staleness/age_steps", sum(ages), len(ages)),
                Metric.sum("staleness/pieces", sum(not item.rollout.is_whole for item in batch)),
                *drops.metrics(),
            ],
            ledger=Ledger(
                trained=" ".join(ledger_entry(item.number, item.rollout) for item in batch),
                dropped=" ".join(drops.entries),
            ),
        )

    def go_on(self) -> None:
        """Begin new rollouts: after the checkpoint and the evaluation where staleness is 0.

        Nothing then runs beside them, as in the sequential loop.
        """
        self._holds_back = False
        self._moved.ring()

    async def _drain(self) -> None:
        """Begin no rollout, and wait until none is running."""
        self._holds_back = True
        progress = time.monotonic()
        while self._running:
            if await self._moved.wait(_STOP_CHECK_S):
                progress = time.monotonic()
            self._check_progress(time.monotonic() - progress)

    @property
    def _num_unscored(self) -> int:
        """Rollouts, or pieces of them, on their way through the teacher."""
        return len(self._waiting) + self._num_scoring

    def _count(self) -> None:
        """Tell the trace how much is under way."""
        self._trace.counter("in_flight", len(self._running))
        self._trace.counter("unscored", self._num_unscored)
        self._trace.counter("ready", len(self._ready))
        generates = bool(self._running) and not self._is_paused
        if generates and self._generating is None:
            self._generating = contextlib.ExitStack()
            self._generating.enter_context(self._trace.span("generate"))
        elif not generates and self._generating is not None:
            self._generating.close()
            self._generating = None


def whole_prompts(ready: Sequence[Ready], size: int, samples: int) -> list[Ready]:
    """The first ``size``, less those of a prompt that has more behind them: it waits whole.

    Only where samples were dropped does the cut not lie between two prompts.
    """
    behind = {item.number // samples for item in ready[size:]}
    return [item for item in ready[:size] if item.number // samples not in behind]
