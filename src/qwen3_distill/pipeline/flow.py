"""The tasks that bring rollouts to the learner, and the state they share.

    draw -> running -> to score -> scoring -> ready -> batch -> settled

| where                            | takes            | waits for                | woken by        |
|----------------------------------|------------------|--------------------------|-----------------|
| `_feed`, a task                  | numbers to draw  | room in the window and   | `_changed`      |
|                                  |                  | in the engine            |                 |
| `_follow`, a task per draw       | ended rollouts   | the engine, or the       | the engine      |
| and model that samples           |                  | teacher                  |                 |
| `_score`, `scoring_calls` tasks  | all to score     | something to score, then | `_queued`,      |
|                                  |                  | the teacher's answer     | the teacher     |
| `next_batch`, the loop           | ready rollouts   | a full batch, a stop, a  | `_changed`, and |
|                                  |                  | harvest's deadline       | `_STOP_CHECK_S` |
| `_pause_when_ready`, a task      | nothing          | enough ended rollouts    | `_changed`      |
| `_drain`, the loop               | nothing          | no rollout running       | `_changed`      |
| `WeightPush`, a task per load    | nothing          | the engine's load        | the engine      |

`_follow` notifies `_queued` and `_changed`, a harvest `_queued`. `_score` notifies `_changed` after
each call, the loop when it drops stale rollouts and when it allows new ones.
"""

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from qwen3_distill.config import Harvest, StreamingPipeline
from qwen3_distill.errors import EngineError, StallError
from qwen3_distill.pipeline.drops import Cause, Drops
from qwen3_distill.pipeline.harvest import harvested, remainder
from qwen3_distill.pipeline.in_progress import RolloutsInProgress
from qwen3_distill.pipeline.notification import Notification
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.push import WeightPush
from qwen3_distill.pipeline.ready import Ready, whole_groups, whole_prompts
from qwen3_distill.pipeline.recorder import Ledger, StepRecord, ledger_entry
from qwen3_distill.pipeline.requests import is_full_length, request_number, with_prefix_budget
from qwen3_distill.pipeline.step import (
    context_metrics,
    is_evaluated_after,
    needs_rollouts,
    none_aligned,
    sampler_of,
    training_rollouts,
)
from qwen3_distill.ports import Sampler
from qwen3_distill.recording.trace import Trace
from qwen3_distill.scoring.by_tag import teacher_id_for
from qwen3_distill.types import (
    FinishReason,
    Metric,
    Rollout,
    RolloutPrefix,
    RolloutRequest,
    RunCursor,
    ScoreFailure,
    UnalignedRollout,
    Update,
)
from qwen3_distill.utils.concurrency import TaskScope, within

Result = TypeVar("Result")

_STOP_CHECK_S = 0.5
"""How often a wait for rollouts looks for a stop: a signal handler cannot wake it."""


class RolloutFlow:
    """Feeds the engine and the teacher, and hands scored rollouts to the learner.

    Args:
        scope: owns the flow's tasks.
    """

    def __init__(self, parts: Parts, trace: Trace, cursor: RunCursor, scope: TaskScope) -> None:
        pipeline = parts.config.pipeline
        assert isinstance(pipeline, StreamingPipeline)
        self._parts, self._config, self._pipeline = parts, parts.config, pipeline
        self._trace, self._scope = trace, scope
        self.cursor = cursor
        samples = self._config.samples_per_prompt
        self._in_progress = RolloutsInProgress(cursor, samples_per_prompt=samples)
        self._running: dict[int, RolloutRequest] = {}
        """Requests in the engine, by rollout number."""
        self._to_score: deque[tuple[int, Rollout]] = deque()
        self._num_scoring = 0
        self._ready: list[Ready] = []
        self._harvested_to: dict[int, int] = {}
        """Response tokens that a running rollout's pieces hold, by its number."""
        self._drops = Drops()
        self._changed = Notification()
        """A rollout ended, was scored, dropped or settled."""
        self._queued = Notification()
        self._generating: contextlib.ExitStack | None = None
        """The trace's span while any rollout is running."""
        self._holds_new_rollouts = False
        """No rollout starts: running ones must end first, or a step must."""
        self._is_paused = False
        self._step_began = time.monotonic()
        self.push = WeightPush(parts, trace, scope)
        scope.spawn(self._feed(), "feed")
        for index in range(pipeline.scoring_calls):
            scope.spawn(self._score(), f"score-{index}")

    async def within_stall_timeout(self, work: Awaitable[Result], what: str) -> Result:
        """Await ``work``; raise StallError after ``stall_timeout_s``."""
        limit_s = self._pipeline.stall_timeout_s
        return await within(limit_s, work, f"{what} (pipeline.stall_timeout_s)")

    async def _feed(self) -> None:
        """Keep the engine as full as the window and the limit in flight allow."""
        while True:
            held = self._holds_new_rollouts
            numbers = [] if held else self._in_progress.draw(self._num_startable())
            if numbers:
                requests = [self._request(number) for number in numbers]
                self._running.update(zip(numbers, requests, strict=True))
                self._update_trace()
                self._start(numbers, requests)
            await self._changed.wait()

    def _start(self, numbers: Sequence[int], requests: Sequence[RolloutRequest]) -> None:
        """Sample requests in tasks of their own, one for each model that samples any of them."""
        taken: dict[int, tuple[Sampler, list[int], list[RolloutRequest]]] = {}
        for number, request in zip(numbers, requests, strict=True):
            sampler = sampler_of(self._parts, number)
            _, own_numbers, own_requests = taken.setdefault(id(sampler), (sampler, [], []))
            own_numbers.append(number)
            own_requests.append(request)
        for sampler, own_numbers, own_requests in taken.values():
            work = self._follow(sampler, own_numbers, own_requests)
            self._scope.spawn(work, f"rollouts from {own_numbers[0]}")

    def _num_startable(self) -> int:
        """How many rollouts may start now.

        The window spans ``max_steps_ahead + 1`` steps from the coming one on. With replay, its
        steps that need no new rollouts count as well, because what starts now ages by them.
        """
        config = self._config
        first, beyond = self.cursor.step, self.cursor.step + config.max_steps_ahead + 1
        batches_ahead = sum(
            needs_rollouts(config.replay, step) for step in range(first, min(beyond, config.steps))
        )
        started = len(self._in_progress) - self._in_progress.num_to_resample
        window = batches_ahead * config.rollouts_per_step - started
        return max(0, min(window, config.max_in_flight - len(self._running)))

    def _request(self, number: int) -> RolloutRequest:
        (prompt,) = self._parts.prompts.take(number // self._config.samples_per_prompt, 1)
        request, budget = request_number(self._config, prompt, number), self._pipeline.prefix
        if budget is None:
            return request
        return with_prefix_budget(request, budget, run_seed=self._config.seed, number=number)

    async def _follow(
        self, sampler: Sampler, numbers: Sequence[int], requests: Sequence[RolloutRequest]
    ) -> None:
        """Sample some requests; queue each rollout for scoring as it ends."""
        number_of = {r.rollout_id: n for n, r in zip(numbers, requests, strict=True)}
        async for rollout in sampler.generate(requests):
            self._finish(number_of.pop(rollout.rollout_id), rollout)
        if number_of:
            raise EngineError(f"the rollout engine ended without {sorted(number_of)}")

    def _finish(self, number: int, rollout: Rollout) -> None:
        del self._running[number]
        rest = remainder(rollout, self._harvested_to.pop(number, 0))
        if rest is None:
            self._in_progress.settle([number])
        else:
            self._queue_for_scoring(number, rest)
        self._update_trace()
        self._changed.notify()

    def _queue_for_scoring(self, number: int, rollout: Rollout) -> None:
        self._to_score.append((number, rollout))
        self._queued.notify()

    async def _score(self) -> None:
        """Score all queued rollouts in one call to the teacher, again and again."""
        while True:
            while not self._to_score:
                await self._queued.wait()
            taken = sorted(self._to_score, key=lambda item: item[0])
            self._to_score.clear()
            self._num_scoring += len(taken)
            self._update_trace()
            with self._trace.span("score", rollouts=len(taken)):
                rollouts = [rollout for _, rollout in taken]
                scores = training_rollouts(self._parts, rollouts)
                what = f"the teacher's scores of {len(taken)} rollouts"
                results = await self.within_stall_timeout(scores, what)
            for (number, rollout), result in zip(taken, results, strict=True):
                if isinstance(result, UnalignedRollout):
                    self._drop(number, rollout, "unaligned", result.reason)
                elif isinstance(result, ScoreFailure):
                    self._drop(number, rollout, "no score", result.reason)
                else:
                    self._ready.append(Ready(number, result))
            self._num_scoring -= len(taken)
            self._update_trace()
            self._changed.notify()

    def _drop(self, number: int, rollout: Rollout, cause: Cause, reason: str = "") -> None:
        teacher = self._parts.scorer
        teacher_id = None if teacher is None else teacher_id_for(teacher, rollout)
        self._drops.add(number, rollout, cause, reason, teacher_id)
        if rollout.finish_reason is not FinishReason.HARVESTED:
            self._in_progress.settle([number])
        if teacher is None:
            return
        if self._drops.count("unaligned") >= self._config.rollouts_per_step:
            raise EngineError(none_aligned(self._drops.count("unaligned"), reason))
        allowed = teacher.max_dropped_fraction * self._config.rollouts_per_step
        failed = self._drops.count("no score")
        if failed > allowed:
            raise EngineError(
                f"{failed} rollouts got no score from {', '.join(self._drops.unscored)} within one "
                f"step, more than the {allowed:.0f} that may be dropped "
                f"(scoring.max_dropped_fraction); the last: {self._drops.last_reason}"
            )

    def _check_each_teacher(self, batch: Sequence[Ready]) -> None:
        """Raise if one of several teachers gave too few scores, which the others' many can hide."""
        teacher = self._parts.scorer
        if teacher is None or not self._drops.unscored:
            return
        scored = Counter(teacher_id_for(teacher, item.rollout) for item in batch)
        for teacher_id, failed in self._drops.unscored.items():
            asked = failed + scored[teacher_id]
            if failed > teacher.max_dropped_fraction * asked:
                raise EngineError(
                    f"{failed} of {asked} rollouts got no score from {teacher_id} within one "
                    f"step, more than the {teacher.max_dropped_fraction:.0%} that may be dropped "
                    f"(scoring.max_dropped_fraction); the last: {self._drops.last_reason}"
                )

    async def next_batch(self, should_stop: Callable[[], bool]) -> list[Ready] | None:
        """Wait for a step's rollouts, lowest numbers first; None if asked to stop before."""
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
                self._check_each_teacher(batch)
                return batch
            if await self._changed.wait(_STOP_CHECK_S):
                progress = time.monotonic()
            self._check_progress(time.monotonic() - progress)
        return None

    def _full_batch(self) -> list[Ready] | None:
        """Take a batch, if one is ready or nothing more can come for it."""
        self._ready.sort(key=lambda item: (item.number, item.rollout.continues_at))
        size, samples = self._config.rollouts_per_step, self._config.samples_per_prompt
        compares = self._config.objective.reward_weight > 0
        ready = self._ready
        if compares:
            ready = whole_groups(ready, self._in_progress.numbers(), samples)
        if len(ready) < size and not (ready and self._no_more_can_come()):
            return None
        return self._take(whole_prompts(ready, size, samples) if compares else ready[:size])

    def _no_more_can_come(self) -> bool:
        """Whether all rollouts that the window allows for this step are ready or dropped."""
        return not (
            self._running
            or self._num_unscored
            or self._in_progress.num_to_resample
            or self._num_startable() >= self._config.samples_per_prompt
        )

    def _take(self, chosen: Sequence[Ready]) -> list[Ready]:
        taken = list(chosen)
        kept = {id(item) for item in taken}
        self._ready = [item for item in self._ready if id(item) not in kept]
        self._update_trace()
        return taken

    def _drop_stale(self) -> None:
        """Drop rollouts that are older than ``max_staleness_steps`` in the coming step."""
        limit = self.cursor.step - self._pipeline.max_staleness_steps
        fresh: list[Ready] = []
        for item in self._ready:
            oldest = item.rollout.oldest_version
            if oldest is not None and oldest.step < limit:
                self._drop(item.number, item.rollout, "stale")
            else:
                fresh.append(item)
        if len(fresh) < len(self._ready):
            self._ready = fresh
            self._changed.notify()

    def _check_progress(self, stalled_s: float) -> None:
        if stalled_s > self._pipeline.stall_timeout_s:
            raise StallError(
                f"step {self.cursor.step}: nothing moved for {stalled_s:.0f} s "
                f"(pipeline.stall_timeout_s): {len(self._running)} rollouts are being sampled, "
                f"{len(self._to_score)} wait for the teacher, {self._num_scoring} are being "
                f"scored, {len(self._ready)} of {self._config.rollouts_per_step} are ready. The "
                "engines' logs are in the run folder"
            )

    def _is_late(self, harvest: Harvest) -> bool:
        return time.monotonic() - self._step_began >= harvest.deadline_s

    async def _harvest(self, harvest: Harvest) -> set[str]:
        """Queue the new tokens of running rollouts for scoring; return the pieces' ids."""
        numbers = {request.rollout_id: n for n, request in self._running.items()}
        what = "what runs, for a harvest"
        prefixes = await self.within_stall_timeout(self._parts.engine.prefixes(), what)
        pieces: set[str] = set()
        for prefix in prefixes:
            number = numbers.get(prefix.request.rollout_id)
            if number is None or number not in self._running:
                continue  # it belongs to an evaluation, or has ended meanwhile
            if is_full_length(self._config.seed, number, harvest.full_length_fraction):
                continue
            piece = self._new_tokens(number, prefix, harvest.min_tokens)
            if piece is not None:
                pieces.add(piece.rollout_id)
                self._queue_for_scoring(number, piece)
        self._trace.instant("generate", "harvest", pieces=len(pieces))
        return pieces

    def _new_tokens(self, number: int, prefix: RolloutPrefix, min_tokens: int) -> Rollout | None:
        start, stop = self._harvested_to.get(number, 0), prefix.response_ids.size
        if stop - start < min_tokens:
            return None
        self._harvested_to[number] = stop
        return harvested(prefix, start)

    def _has_unscored(self, rollout_ids: set[str]) -> bool:
        waiting = {rollout.rollout_id for _, rollout in self._to_score}
        return bool(self._num_scoring or waiting & rollout_ids)

    @contextlib.asynccontextmanager
    async def paused_when_ahead(self) -> AsyncIterator[None]:
        """Pause decoding during a learner's step once enough rollouts for later steps have ended.

        Decoding resumes with all its rollouts. Without the pause it would decode the last ones in
        a batch that empties, and take the device from the learner for little.
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
        """Pause the engine once ``num_rollouts`` have ended; resume it when cancelled."""
        while self._num_unscored + len(self._ready) < num_rollouts:
            await self._changed.wait()
        self._is_paused = True
        self._update_trace()
        pause = asyncio.ensure_future(self._parts.engine.pause())
        try:
            await asyncio.shield(pause)
            await asyncio.Event().wait()
        finally:
            await pause
            await self._parts.engine.resume()
            self._is_paused = False
            self._update_trace()

    async def publish_and_settle(self, batch: Sequence[Ready], update: Update) -> StepRecord:
        """Push the new weights, settle the batch's rollouts and let new ones take their places."""
        self._holds_new_rollouts = self._config.max_steps_ahead == 0
        if self._pipeline.weight_updates == "boundary":
            await self._drain()
        await self.push.publish(waits=is_evaluated_after(self._config, self.cursor.step + 1))
        for item in batch:
            if not item.is_last:
                self._in_progress.mark_harvested(item.number)
        oldest = [item.rollout.oldest_version for item in batch]
        ages = [self.cursor.step - version.step for version in oldest if version is not None]
        self._in_progress.settle(item.number for item in batch if item.is_last)
        self.cursor = RunCursor(
            step=self.cursor.step + 1,
            prompts_drawn=self._in_progress.prompts_drawn,
            weight_version=update.version,
            outstanding=self._in_progress.to_resume(),
        )
        drops, self._drops = self._drops, Drops()
        if self._config.max_steps_ahead > 0:
            self.allow_new_rollouts()
        scored = [item.scored for item in batch]
        compared = list[Metric]()
        if self._parts.compares_context(self.cursor.step):
            comparing = context_metrics(self._parts, self._trace, self.cursor.step, scored)
            what = "the teacher's scores of a sample"
            compared = await self.within_stall_timeout(comparing, what)
        return StepRecord(
            cursor=self.cursor,
            scored=scored,
            update=update,
            metrics=[
                *compared,
                *self.push.metrics(),
                Metric.mean("staleness/age_steps", sum(ages), len(ages)),
                Metric.sum("staleness/pieces", sum(not item.rollout.is_whole for item in batch)),
                *drops.metrics(),
            ],
            ledger=Ledger(
                trained=" ".join(ledger_entry(item.number, item.rollout) for item in batch),
                dropped=" ".join(drops.entries),
            ),
        )

    def allow_new_rollouts(self) -> None:
        """Let rollouts start again.

        With staleness 0 the loop calls this after the checkpoint and the evaluation, so that
        nothing runs concurrently with them, as in the sequential loop.
        """
        self._holds_new_rollouts = False
        self._changed.notify()

    async def _drain(self) -> None:
        """Start no rollout, and wait until none is running."""
        self._holds_new_rollouts = True
        progress = time.monotonic()
        while self._running:
            if await self._changed.wait(_STOP_CHECK_S):
                progress = time.monotonic()
            self._check_progress(time.monotonic() - progress)

    @property
    def _num_unscored(self) -> int:
        """Rollouts, and pieces of them, that were sampled and have no score yet."""
        return len(self._to_score) + self._num_scoring

    def _update_trace(self) -> None:
        """Write the numbers of rollouts in each state to the trace."""
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
