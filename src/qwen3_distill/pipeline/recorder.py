"""What happens around a step: metrics, rollouts, checkpoints, evaluations, the report."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen3_distill.config import EvaluationConfig, RunConfig
from qwen3_distill.config.load import dump_config
from qwen3_distill.data.rollout_files import write_scored
from qwen3_distill.evaluation.accuracy import evaluate
from qwen3_distill.pipeline.assembly.channel import samples_elsewhere
from qwen3_distill.pipeline.assembly.data import build_checker, build_problems
from qwen3_distill.pipeline.assembly.teachers import teacher_sampler
from qwen3_distill.pipeline.checkpoints import CheckpointStore
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run_folder import RunFolder
from qwen3_distill.ports import Sampler
from qwen3_distill.recording.console import ProgressReporter
from qwen3_distill.recording.jsonl import (
    JsonlLog,
    combine,
    read_jsonl,
)
from qwen3_distill.recording.trace import Trace
from qwen3_distill.recording.trackers import open_trackers
from qwen3_distill.types import (
    Batch,
    FinishReason,
    Metric,
    Rollout,
    RunCursor,
    ScoredRollout,
    Update,
)
from qwen3_distill.utils.concurrency import together
from qwen3_distill.utils.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What became of a step's rollouts, by their numbers, separated by spaces."""

    trained: str
    """``12`` is all of rollout 12, ``12@128+64`` are 64 of its tokens from token 128 on."""
    dropped: str
    """The same with a cause: ``12:stale``."""


def ledger_entry(number: int, rollout: Rollout) -> str:
    """A rollout, or a piece of one, as the `Ledger` names it."""
    if rollout.is_whole:
        return str(number)
    return f"{number}@{rollout.continues_at}+{rollout.num_tokens}"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A finished step."""

    cursor: RunCursor
    """Where the run stands after it."""
    scored: Sequence[ScoredRollout]
    update: Update
    metrics: Sequence[Metric]
    """What the pipeline has to say beyond batch and update."""
    ledger: Ledger


class Recorder:
    """Writes the run folder. It is told what happened and decides nothing about training.

    Everything it writes is bound to a step. Records later than ``start_step``, left by a process
    that got further than its last checkpoint, are taken back, so that a resumed run's files read
    as if it had never stopped.
    """

    def __init__(
        self, parts: Parts, folder: RunFolder, progress: ProgressReporter, *, start_step: int
    ) -> None:
        self._parts = parts
        self._config: RunConfig = parts.config
        self._folder = folder
        self._progress = progress
        self._metrics = JsonlLog(folder.metrics)
        self._metrics.truncate_after(start_step)
        self._evaluations = JsonlLog(folder.evaluations)
        self._evaluations.truncate_after(start_step)
        self._ledger = JsonlLog(folder.ledger)
        self._ledger.truncate_after(start_step)
        self._trackers = open_trackers(
            self._config.logging,
            folder.path,
            dump_config(self._config),
            resume_step=start_step if start_step else None,
        )
        self._checkpoints = CheckpointStore(
            folder.checkpoints, keep_last=self._config.checkpoint.keep_last
        )
        self.trace = Trace(
            folder.trace if self._config.logging.trace else None,
            title=f"{folder.path.name} from step {start_step}",
        )
        """The pipeline's clock, for its stages, queues and weight versions."""
        earlier = read_jsonl(folder.metrics)
        spent_s = float(earlier[-1]["wall_s"]) if earlier else 0.0
        self._clock_started = time.perf_counter() - spent_s
        self._last_checkpoint_step = start_step if start_step else None
        self._evaluator = (
            _Evaluator(parts, self._config.evaluation, progress)
            if self._config.evaluation
            else None
        )
        self._evaluated_s = 0.0
        """Of the evaluations that have ended; what two did side by side counts once."""
        self.stop_requested = False
        """Set by the signal handler: finish the step, save, leave."""

    @property
    def wall_s(self) -> float:
        """Seconds since the run began; those of killed processes' lost steps are not in it."""
        return time.perf_counter() - self._clock_started

    async def after_step(self, done: StepRecord) -> None:
        """Log a finished step; save and evaluate when the config says so."""
        cursor, scored, ledger = done.cursor, done.scored, done.ledger
        times = self.trace.end_step(cursor.step)
        values = self._step_values(scored, done.update, [*times.metrics(), *done.metrics])
        values |= {**self._parts.engine.counters, **self._parts.teacher.counters}
        self._ledger.log(cursor.step, {"trained": ledger.trained, "dropped": ledger.dropped})
        self._metrics.log(cursor.step, values)
        self._trackers.log(cursor.step, values)
        self._progress.step(cursor.step, values)
        self._save_rollouts(cursor.step - 1, scored)
        last = cursor.step == self._config.steps
        if last or self.stop_requested or cursor.step % self._config.checkpoint.every_steps == 0:
            await self.checkpoint(cursor)
        await self.evaluate_if_due(cursor)

    async def checkpoint(self, cursor: RunCursor) -> None:
        """Save a checkpoint of the learner at this cursor, unless there is one already."""
        if cursor.step == self._last_checkpoint_step:
            return
        with self.trace.span("checkpoint", f"checkpoint {cursor.step}"):
            await self._checkpoints.save(self._parts.learner, cursor)
        self._last_checkpoint_step = cursor.step

    async def evaluate_if_due(self, cursor: RunCursor) -> None:
        """Measure the student (and before the run the teacher), unless that is on record."""
        if self._evaluator is None or self.stop_requested:
            return
        done = {(r["step"], r["model"]) for r in read_jsonl(self._folder.evaluations)}
        due = [m for m in self._evaluator.due(cursor.step) if (cursor.step, m) not in done]
        if samples_elsewhere(self._config):
            await together(*(self._evaluate(self._evaluator, m, cursor.step) for m in due))
            return
        for model in due:
            if not self.stop_requested:
                await self._evaluate(self._evaluator, model, cursor.step)

    async def _evaluate(self, evaluator: "_Evaluator", model: str, step: int) -> None:
        started = time.perf_counter()
        with self.trace.span("evaluate", model, step=step):
            result = await evaluator.run(model, step)
        busy_s = self.trace.busy_seconds("evaluate")
        record = {
            "model": model,
            **result,
            "wall_s": time.perf_counter() - started,
            # Without what was beside another evaluation.
            "time/evaluate_s": busy_s - self._evaluated_s,
        }
        self._evaluated_s = busy_s
        self._evaluations.log(step, record)
        self._progress.evaluation({"step": step, **record})
        if model == "student":
            self._trackers.log(step, {"evaluation/accuracy": result["accuracy"]})

    def save_failed_batch(self, step: int, batch: Batch) -> Path:
        """Write a batch that could not be trained on, for inspection."""
        path = self._folder.path / f"failed-step-{step:06d}.parquet"
        write_scored(path, [(step, item) for item in batch.scored], self._parts.text.decode)
        return path

    def close(self) -> None:
        self._metrics.close()
        self._evaluations.close()
        self._ledger.close()
        self.trace.close()
        self._trackers.close()

    def _step_values(
        self, scored: Sequence[ScoredRollout], update: Update, more: Sequence[Metric]
    ) -> dict[str, float]:
        rollouts = [item.rollout for item in scored]
        ended = [r for r in rollouts if r.finish_reason is not FinishReason.HARVESTED]
        truncated = sum(r.finish_reason is FinishReason.LENGTH for r in ended)
        metrics = [
            *update.metrics,
            *more,
            Metric.last("loss/objective", update.loss),
            Metric.last("optim/grad_norm", update.grad_norm),
            Metric.mean(
                "rollout/response_tokens", sum(r.num_tokens for r in rollouts), len(rollouts)
            ),
            Metric.mean("rollout/truncated_fraction", truncated, len(ended)),
            Metric.sum("tokens/generated", sum(r.num_tokens for r in rollouts)),
            Metric.sum("tokens/trained", update.num_loss_tokens),
        ]
        if self._parts.is_correct is not None:
            whole = [rollout for rollout in rollouts if rollout.is_whole]
            correct = sum(self._parts.is_correct(rollout) for rollout in whole)
            metrics.append(Metric.mean("rollout/accuracy", correct, len(whole)))
        return {"wall_s": self.wall_s, **combine(metrics)}

    def _save_rollouts(self, step: int, scored: Sequence[ScoredRollout]) -> None:
        logging = self._config.logging
        if step % logging.rollouts_every_steps and step != self._config.steps - 1:
            return
        self._folder.rollouts.mkdir(exist_ok=True)
        kept = [(step, item) for item in scored[: logging.rollouts_per_save]]
        path = self._folder.rollouts / f"step-{step:06d}.parquet"
        write_scored(path, kept, self._parts.text.decode)


@dataclass
class _Evaluator:
    """Which evaluation is due when, and how it is done."""

    parts: Parts
    evaluation: EvaluationConfig
    progress: ProgressReporter

    def __post_init__(self) -> None:
        text = self.parts.text
        self._problems = build_problems(self.parts.config, self.evaluation, text)
        self._answers: dict[str, str] = {}
        """By model that is being evaluated: how many of how many."""
        self._is_correct = build_checker(self.evaluation.verifier, text)

    def due(self, step: int) -> list[str]:
        models = ["teacher"] if step == 0 and self.evaluation.teacher else []
        regular = step % self.evaluation.every_steps == 0 or step == self.parts.config.steps
        return [*models, "student"] if regular else models

    async def run(self, model: str, step: int) -> dict[str, Any]:
        evaluation = self.evaluation
        count = evaluation.num_problems
        if step in (0, self.parts.config.steps) and evaluation.final_num_problems is not None:
            count = evaluation.final_num_problems
        if model == "student":
            return await self._measure(model, count, self.parts.engine)
        async with teacher_sampler(self.parts.config, self.parts.teacher) as teacher:
            return await self._measure(model, count, teacher)

    async def _measure(self, model: str, count: int, engine: Sampler) -> dict[str, Any]:
        evaluation = self.evaluation

        def count_answer(done: int, total: int) -> None:
            self._answers[model] = f"the {model} {done}/{total}"
            self.progress.stage(f"evaluating {', '.join(self._answers.values())}")

        try:
            result = await evaluate(
                engine,
                self._problems(count),
                self._is_correct,
                sampling=evaluation.sampling,
                samples_per_problem=evaluation.samples_per_problem,
                seed=derive_seed(self.parts.config.seed, "evaluation"),
                on_rollout=count_answer,
            )
        finally:
            self._answers.pop(model, None)
        return asdict(result)
