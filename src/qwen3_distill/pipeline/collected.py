"""The offline loop: rollouts and scores are collected once, then trained on in epochs.

    file, or generate by the student as it is before the run, or by the teacher
        --> score --> collected/step-*.parquet --> epoch 0, 1, ... --> batch --> update

Every file of the collection is written whole, and a resumed run reads it instead of sampling again.
A step's batch follows from its number alone: epoch 0 takes the rollouts in order, later epochs in
an order that derives from the seed.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen3_distill.config import RunConfig, needs_hidden_states
from qwen3_distill.data.rollout_files import read_training, write_training
from qwen3_distill.errors import DataError, RunFolderError
from qwen3_distill.pipeline.file_context import items_in_own_context
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.recorder import Ledger, Recorder, StepRecord
from qwen3_distill.pipeline.requests import requests_for_step
from qwen3_distill.pipeline.sampler_check import check_sampled_by_student
from qwen3_distill.pipeline.step import (
    context_metrics,
    needs_new_weights,
    ready_to_train,
    sample,
    take_step,
    traced_push,
)
from qwen3_distill.recording.text import clock
from qwen3_distill.scoring.by_tag import teacher_id_for
from qwen3_distill.types import (
    HiddenScore,
    Metric,
    Rollout,
    RunCursor,
    ScoredRollout,
    TopKRequest,
    TopKScore,
    TrainingRollout,
)
from qwen3_distill.utils.seeds import derive_seed


async def run_offline(parts: Parts, recorder: Recorder, cursor: RunCursor) -> RunCursor:
    """Train from ``cursor`` to the last step, or until the recorder is asked to stop.

    The learner must stand at the cursor's weight version.

    Raises:
        RunFolderError: rollouts that were collected before the first step are gone.
        NonFiniteError: a step had no finite loss or gradient; its batch is in the run folder.
    """
    config, trace = parts.config, recorder.trace
    await traced_push(parts, trace)  # the engine has no weights yet
    await recorder.evaluate_if_due(cursor)
    trace.begin_steps()
    pool = await _Collector(parts, recorder, cursor).collect()
    if pool is None:
        return cursor
    schedule = EpochSchedule(
        num_rollouts=len(pool), batch_size=config.rollouts_per_step, seed=config.seed
    )
    while cursor.step < config.steps and not recorder.stop_requested:
        epoch, indices = schedule.batch(cursor.step)
        batch = [pool[index] for index in indices]
        if needs_hidden_states(config.objective):
            with trace.span("score", rollouts=len(batch)):
                batch = await ready_to_train(parts, [item.rollout for item in batch])
        with trace.span("train", rollouts=len(batch)):
            update = await take_step(parts, recorder, batch)
        if needs_new_weights(config, cursor.step + 1):
            await traced_push(parts, trace)
        cursor = RunCursor(
            step=cursor.step + 1, prompts_drawn=cursor.prompts_drawn, weight_version=update.version
        )
        await recorder.after_step(
            StepRecord(
                cursor=cursor,
                scored=batch,
                update=update,
                metrics=[
                    Metric.last("offline/epoch", epoch),
                    *await context_metrics(parts, trace, cursor.step, batch),
                ],
                ledger=Ledger(trained=" ".join(map(str, indices)), dropped=""),
                is_fresh=epoch == 0 and config.rollouts.source != "file",
            )
        )
    return cursor


@dataclass(frozen=True, kw_only=True)
class EpochSchedule:
    """Which rollouts each step trains on: all of them once in every epoch."""

    num_rollouts: int
    batch_size: int
    """The last batch of an epoch has what is left."""
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rollouts // self.batch_size)

    def batch(self, step: int) -> tuple[int, list[int]]:
        """Return a step's epoch, and the indices of its rollouts."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = np.arange(self.num_rollouts)
        if epoch > 0:
            seed = derive_seed(self.seed, "epoch", epoch)
            order = np.random.Generator(np.random.PCG64(seed)).permutation(order)
        return epoch, order[index * self.batch_size : (index + 1) * self.batch_size].tolist()


class _Collector:
    """Samples or reads rollouts, scores them, and keeps both in the run folder."""

    def __init__(self, parts: Parts, recorder: Recorder, cursor: RunCursor) -> None:
        self._parts, self._recorder, self._cursor = parts, recorder, cursor
        self._config = parts.config
        self._scores_now = parts.scorer is not None and not needs_hidden_states(
            parts.config.objective
        )
        """Hidden states are thousands of numbers a token: they are not kept, but made again at
        every step."""

    async def collect(self) -> list[TrainingRollout] | None:
        """Return all rollouts, those of earlier processes included; None if asked to stop."""
        read = list(self._read_file())
        if self._config.rollouts.file is not None and not self._scores_now:
            return [TrainingRollout(rollout=item.rollout) for _, item in read]
        if read and all(self._fits(item) for _, item in read):
            return [item for _, item in read]
        given = [item.rollout for _, item in read]
        size = self._config.rollouts_per_step
        num_files = -(-len(given) // size) if given else _collect_steps(self._config)
        pool: list[TrainingRollout] = []
        began, tokens = time.monotonic(), 0
        self._recorder.collect((), ends=False)
        for number in range(num_files):
            if self._recorder.stop_requested:
                return None
            path = self._recorder.collected / f"step-{number:06d}.parquet"
            if path.exists():
                pool += [item for _, item in read_training(path)]
                continue
            self._require_start(path)
            found = await self._make(number, given[number * size : (number + 1) * size])
            self._write(path, number, found)
            ids = [item.rollout.rollout_id for item in found]
            self._recorder.collect(ids, ends=number + 1 == num_files)
            pool += found
            tokens += sum(item.rollout.num_tokens for item in found)
            self._report(number + 1, num_files, tokens, time.monotonic() - began)
        if not pool:
            raise DataError("no rollout was collected that can be trained on")
        return pool

    async def _make(self, number: int, given: Sequence[Rollout]) -> list[TrainingRollout]:
        """Return the rollouts of one file: sampled unless ``given``, scored if scores are kept."""
        config, trace = self._config, self._recorder.trace
        rollouts = list(given)
        if not rollouts:
            prompts = self._parts.prompts.take(
                number * config.prompts_per_step, config.prompts_per_step
            )
            requests = requests_for_step(config, prompts, number)
            with trace.span("generate", rollouts=len(requests)):
                rollouts = await sample(
                    config,
                    self._parts.engine,
                    self._parts.teacher_rollouts,
                    requests,
                    number * config.rollouts_per_step,
                )
        if not self._scores_now:
            return [TrainingRollout(rollout=rollout) for rollout in rollouts]
        with trace.span("score", rollouts=len(rollouts)):
            return await ready_to_train(self._parts, rollouts)

    def _write(self, path: Path, number: int, found: Sequence[TrainingRollout]) -> None:
        path.parent.mkdir(exist_ok=True)
        write_training(path, [(number, item) for item in found], self._parts.text.decode)

    def _require_start(self, path: Path) -> None:
        if self._cursor.step > 0 and self._config.rollouts.file is None:
            raise RunFolderError(
                f"{path} is gone: the run collected it before its first step, and the student has "
                f"taken {self._cursor.step} steps since, so it cannot be sampled again; restore "
                "it, or choose another output_dir"
            )

    def _report(self, done: int, total: int, tokens: int, elapsed_s: float) -> None:
        rate = tokens / max(elapsed_s, 1e-9)
        left = clock(elapsed_s / done * (total - done))
        self._recorder.say(
            f"collecting rollouts: {done} of {total} steps, {rate:,.0f} tok/s, {left} left"
        )

    def _read_file(self) -> Iterator[tuple[int, TrainingRollout]]:
        """Read and check the rollouts of `rollouts.file`, if there is one."""
        if self._config.rollouts.file is None:
            return
        file = Path(self._config.rollouts.file)
        rows = read_training(file, vocab_size=self._parts.learner.identity.vocab_size)
        if not rows:
            raise DataError(f"{file} has no rollouts to train on")
        rollouts = [item.rollout for _, item in rows]
        objective = self._config.objective
        for rollout in rollouts:
            if rollout.sampled_by not in objective.learns_from:
                raise DataError(
                    f"{file}: rollout {rollout.rollout_id} was sampled by the "
                    f"{rollout.sampled_by}, and objective.kind={objective.kind} does not learn "
                    f"from that: {objective.refusal}"
                )
        if objective.needs_ratio and self._cursor.step == 0:
            check_sampled_by_student(rollouts, file, self._config, self._parts.learner.version)
        items = items_in_own_context(
            [item for _, item in rows],
            file,
            lambda: self._parts.prompts,
            has=self._parts.prompts.has_context,
        )
        for item in items if self._parts.scorer is not None else ():
            self._parts.view.job(item.rollout)  # a rollout without a teacher is refused now
        yield from ((step, item) for (step, _), item in zip(rows, items, strict=True))

    def _fits(self, item: TrainingRollout) -> bool:
        """Whether a rollout has the score that the objective and the teacher would give it."""
        scorer, request = self._parts.scorer, self._config.objective.score_request
        if not isinstance(item, ScoredRollout) or scorer is None:
            return False
        score = item.score
        if score.teacher_id != teacher_id_for(scorer, item.rollout):
            return False
        if isinstance(request, TopKRequest):
            return isinstance(score, TopKScore) and score.candidate_ids.shape[1] == request.k
        return not isinstance(score, TopKScore | HiddenScore)


def _collect_steps(config: RunConfig) -> int:
    pipeline = config.pipeline
    assert pipeline.kind == "offline"
    assert pipeline.collect_steps is not None, "a rule requires it"
    return pipeline.collect_steps
