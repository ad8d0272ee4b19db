"""Records a run around its steps: metrics, ledger, rollouts, checkpoints, evaluations."""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import dump_config
from qwen3_distill.config.redaction import recordable
from qwen3_distill.data.rollout_files import write_training
from qwen3_distill.evaluation.evaluator import Evaluator
from qwen3_distill.pipeline.assembly.data import build_checker, build_problems
from qwen3_distill.pipeline.by_tag import metrics_by_tag, tags_of
from qwen3_distill.pipeline.checkpoints import CheckpointStore
from qwen3_distill.pipeline.metering import Meter, metered_evaluation
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.requests import rollout_id
from qwen3_distill.pipeline.rollout_store import remove_old_rollouts, rollout_file
from qwen3_distill.pipeline.run_folder import RunFolder
from qwen3_distill.recording.console import ProgressReporter
from qwen3_distill.recording.fleet_rates import FleetRates
from qwen3_distill.recording.jsonl import (
    JsonlLog,
    combine,
)
from qwen3_distill.recording.output import output_losses
from qwen3_distill.recording.records import read_evaluations, read_ledger, read_steps
from qwen3_distill.recording.trace import Trace
from qwen3_distill.recording.trackers import open_trackers
from qwen3_distill.types import (
    AlignedRollout,
    Batch,
    FinishReason,
    Metric,
    Rollout,
    RunCursor,
    TrainingRollout,
    Update,
)
from qwen3_distill.utils.concurrency import together


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """A step's rollouts by number, separated by spaces: those trained on and those dropped."""

    trained: str
    """``12``: all of rollout 12. ``12@128+64``: 64 of its tokens, from token 128 on."""
    dropped: str
    """The same with a cause: ``12:stale``."""


def ledger_entry(number: int, rollout: Rollout) -> str:
    """The `Ledger`'s name of a rollout, or of a piece of one."""
    if rollout.is_whole:
        return str(number)
    return f"{number}@{rollout.continues_at}+{rollout.num_tokens}"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A finished step."""

    cursor: RunCursor
    """Where the run stands after it."""
    scored: Sequence[TrainingRollout]
    update: Update
    metrics: Sequence[Metric]
    """Metrics of the loop, in addition to those of batch and update."""
    ledger: Ledger
    is_fresh: bool = True
    """Whether the run sampled the rollouts and trains on them for the first time."""


class Recorder:
    """Writes the run folder, and saves and evaluates when the config says so.

    Every record belongs to a step. Those after ``start_step``, left by a process that got further
    than its last checkpoint, are removed: a resumed run's files read as if it had never stopped.
    The cost ledger alone keeps them, as lost.

    Args:
        meter: counts what the run costs; None: no cost is recorded.
    """

    def __init__(
        self,
        parts: Parts,
        folder: RunFolder,
        progress: ProgressReporter,
        *,
        start_step: int,
        meter: Meter | None = None,
    ) -> None:
        self._parts = parts
        self._config: RunConfig = parts.config
        self._folder = folder
        self._progress = progress
        for read, file in (
            (read_steps, folder.metrics),
            (read_evaluations, folder.evaluations),
            (read_ledger, folder.ledger),
        ):
            read(file)  # of another form, it is refused before anything is taken back
        self._metrics = JsonlLog(folder.metrics)
        self._metrics.truncate_after(start_step)
        self._evaluations = JsonlLog(folder.evaluations)
        self._evaluations.truncate_after(start_step)
        self._ledger = JsonlLog(folder.ledger)
        self._ledger.truncate_after(start_step)
        self._trackers = open_trackers(
            self._config.logging,
            folder.path,
            recordable(dump_config(self._config)),
            resume_step=start_step if start_step else None,
        )
        self._checkpoints = CheckpointStore(
            folder.checkpoints,
            keep_last=self._config.checkpoint.keep_last,
            identity=folder.identity,
        )
        self.trace = Trace(
            folder.trace if self._config.logging.trace else None,
            title=f"{folder.path.name} from step {start_step}",
        )
        """Clock and trace of the pipeline's stages, queues and weight versions."""
        self._fleet_rates = _watch_fleets(parts, self.trace)
        earlier = read_steps(folder.metrics)
        spent_s = float(earlier[-1]["wall_s"]) if earlier else 0.0
        self._clock_started = time.perf_counter() - spent_s
        self._last_checkpoint_step = start_step if start_step else None
        self._cost = None if meter is None else meter.ledger
        if self._cost is not None:
            self._cost.begin(start_step, self.trace.shares)
        evaluated = parts if meter is None else metered_evaluation(parts, meter)
        self._evaluator = _build_evaluator(evaluated, progress)
        self._evaluated_s = 0.0
        """Seconds of the evaluations that have ended; time in which two ran counts once."""
        self._steps_cut = 0
        """Steps of which every rollout was cut at `sampling.max_new_tokens`."""
        self.stop_requested = False
        """Set by the signal handler: finish the step, save, leave."""
        self._losses_noted = 0

    @property
    def wall_s(self) -> float:
        """Seconds since the run began, without steps that killed processes lost."""
        return time.perf_counter() - self._clock_started

    async def after_step(self, done: StepRecord) -> None:
        """Log a finished step; save and evaluate if due."""
        cursor, scored, ledger = done.cursor, done.scored, done.ledger
        times = self.trace.end_step(cursor.step)
        values = self._step_values(done, times.metrics())
        self._parts.forget_checks()
        values |= self._parts.counters
        values |= self._fleet_rates.of_step(values)
        values |= self._cost_of_step(cursor)
        record = {"trained": ledger.trained, "dropped": ledger.dropped}
        if self._config.tags:
            record["tags"] = " ".join(tags_of([item.rollout for item in scored]))
        self._ledger.log(cursor.step, record)
        self._metrics.log(cursor.step, values)
        self._trackers.log(cursor.step, values)
        self._progress.step(cursor.step, values)
        self._note_lost_output()
        self._note_if_all_cut(cursor.step, [item.rollout for item in scored])
        self._note_retries(cursor.step, values)
        self._save_rollouts(cursor.step - 1, scored)
        last = cursor.step == self._config.steps
        if last or self.stop_requested or cursor.step % self._config.checkpoint.every_steps == 0:
            await self.checkpoint(cursor)
        await self.evaluate_if_due(cursor)

    async def checkpoint(self, cursor: RunCursor) -> None:
        """Save a checkpoint at this cursor, unless there is one."""
        if cursor.step == self._last_checkpoint_step:
            return
        with self.trace.span("checkpoint", f"checkpoint {cursor.step}"):
            parts = self._parts
            await self._checkpoints.save(parts.learner, cursor, parts.following)
        self._last_checkpoint_step = cursor.step
        if self._cost is not None:
            self._cost.write("checkpoint")

    async def evaluate_if_due(self, cursor: RunCursor) -> None:
        """Run the evaluations due after this step that are not on record."""
        if self._evaluator is None or self.stop_requested:
            return
        done = {(r["step"], r["model"]) for r in read_evaluations(self._folder.evaluations)}
        due = [
            [m for m in self._evaluator.measurements(model) if (cursor.step, m) not in done]
            for model in self._evaluator.due(cursor.step)
        ]
        if self._parts.samples_elsewhere:
            await together(*(self._evaluate(self._evaluator, m, cursor) for m in due))
            return
        for names in due:
            await self._evaluate(self._evaluator, names, cursor)

    async def _evaluate(
        self, evaluator: Evaluator, names: Sequence[str], cursor: RunCursor
    ) -> None:
        """Make the evaluations of one model, one after another."""
        for name in names:
            if not self.stop_requested:
                await self._measure(evaluator, name, cursor)

    async def _measure(self, evaluator: Evaluator, model: str, cursor: RunCursor) -> None:
        started, step = time.perf_counter(), cursor.step
        with self.trace.span("evaluate", model, step=step):
            result = await evaluator.run(model, step, cursor.weight_version)
        busy_s = self.trace.busy_seconds("evaluate")
        record = {
            "model": model,
            **result,
            "wall_s": time.perf_counter() - started,
            # Without the time of an evaluation that ran concurrently.
            "time/evaluate_s": busy_s - self._evaluated_s,
        }
        self._evaluated_s = busy_s
        self._evaluations.log(step, record)
        if self._cost is not None:
            self._cost.write("evaluation")
        self._progress.evaluation({"step": step, **record})
        if result["truncated_fraction"] == 1:
            self._progress.note(
                f"all answers of this evaluation ({model}) were cut at "
                "evaluation.sampling.max_new_tokens: none ended by itself"
            )
        if model.startswith("student"):
            key = model.replace("student", "evaluation/accuracy", 1).replace("@", "_at_")
            self._trackers.log(step, {key: result["accuracy"]})

    def save_failed_batch(self, step: int, batch: Batch) -> Path:
        """Write a batch that the learner refused; return the file."""
        path = self._folder.path / f"failed-step-{step:06d}.parquet"
        write_training(path, [(step, item) for item in batch.scored], self._parts.text.decode)
        return path

    def close(self) -> None:
        self._note_lost_output()
        if self._cost is not None:
            self._cost.close()
        self._metrics.close()
        self._evaluations.close()
        self._ledger.close()
        self.trace.close()
        self._trackers.close()

    def collect(self, rollout_ids: Collection[str], *, ends: bool) -> None:
        """Tell the cost ledger which rollouts collected files keep; see `CostLedger.collect`."""
        if self._cost is not None:
            self._cost.collect(rollout_ids, ends=ends)

    def _cost_of_step(self, cursor: RunCursor) -> dict[str, float]:
        """Write the cost ledger's line of a step; return its totals as metrics."""
        if self._cost is None:
            return {}
        outstanding = {rollout_id(self._config, number) for number in cursor.outstanding}
        self._cost.end_step(cursor.step, outstanding)
        return self._cost.metrics()

    def _note_lost_output(self) -> None:
        """Record in trace and ``logs/console.log`` that a terminal or pipe was closed."""
        for loss in output_losses()[self._losses_noted :]:
            self._losses_noted += 1
            self.trace.instant("console", loss)
            log = self._folder.console_log
            at = datetime.now(timezone.utc).isoformat(timespec="seconds")
            with suppress(OSError):  # the trace has it, and a note must not end a run
                log.parent.mkdir(exist_ok=True)
                with log.open("a", encoding="utf-8") as file:
                    file.write(f"{at} {loss}\n")

    def _step_values(self, done: StepRecord, times: Sequence[Metric]) -> dict[str, float]:
        update, rollouts = done.update, [item.rollout for item in done.scored]
        ended = [r for r in rollouts if r.finish_reason is not FinishReason.HARVESTED]
        truncated = sum(r.finish_reason is FinishReason.LENGTH for r in ended)
        metrics = [
            *update.metrics,
            *times,
            *done.metrics,
            Metric.last("loss/objective", update.loss),
            Metric.last("optim/grad_norm", update.grad_norm),
            Metric.mean(
                "rollout/response_tokens", sum(r.num_tokens for r in rollouts), len(rollouts)
            ),
            Metric.mean("rollout/truncated_fraction", truncated, len(ended)),
            Metric.sum(
                "tokens/generated", sum(r.num_tokens for r in rollouts) if done.is_fresh else 0
            ),
            Metric.sum("tokens/trained", update.num_loss_tokens),
        ]
        aligned = [item for item in done.scored if isinstance(item, AlignedRollout)]
        if aligned:
            sampled = sum(item.rollout.num_loss_tokens for item in aligned)
            unaligned = sampled - sum(item.num_loss_tokens for item in aligned)
            metrics.append(Metric.sum("tokens/unaligned", unaligned))
        rewards = self._rewards(rollouts)
        metrics += self._metrics_by_sampler(rollouts, rewards)
        metrics += metrics_by_tag(done.scored, rewards) if self._config.tags else []
        return {"wall_s": self.wall_s, **combine(metrics)}

    def _rewards(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """The verifier's rewards of whole rollouts, by id; empty without a verifier."""
        if self._parts.verifier is None:
            return {}
        whole = [rollout for rollout in rollouts if rollout.is_whole]
        return {rollout.rollout_id: self._parts.verifier.reward(rollout) for rollout in whole}

    def _metrics_by_sampler(
        self, rollouts: Sequence[Rollout], rewards: Mapping[str, float]
    ) -> list[Metric]:
        """The verifier's accuracy, and where a teacher sampled its share and both accuracies."""
        by_teacher = [rollout.sampled_by == "teacher" for rollout in rollouts]
        metrics = []
        has_teacher = self._config.rollouts.source != "student"
        if has_teacher:
            metrics.append(Metric.mean("rollout/teacher_share", sum(by_teacher), len(rollouts)))
        if self._parts.verifier is None:
            return metrics
        whole = [rollout for rollout in rollouts if rollout.is_whole]
        total = sum(rewards[rollout.rollout_id] for rollout in whole)
        metrics.append(Metric.mean("rollout/accuracy", total, len(whole)))
        if has_teacher:
            for name in ("student", "teacher"):
                own = [rewards[r.rollout_id] for r in whole if r.sampled_by == name]
                if own:
                    metrics.append(Metric.mean(f"rollout/accuracy_{name}", sum(own), len(own)))
        return metrics

    @property
    def collected(self) -> Path:
        """Folder of the rollouts that an offline pipeline collects."""
        return self._folder.path / "collected"

    def say(self, text: str) -> None:
        """Tell the user what the run is doing."""
        self._progress.stage(text)

    def _note_if_all_cut(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Say that no rollout of a step ended by itself, at the 1st, 10th, 100th ... such step."""
        limit = self._config.sampling.max_new_tokens
        if not rollouts or not all(_is_cut(rollout, limit) for rollout in rollouts):
            return
        self._steps_cut += 1
        if self._steps_cut not in (1, 10, 100, 1_000, 10_000):
            return
        times = f" ({self._steps_cut} steps so far)" if self._steps_cut > 1 else ""
        self._progress.note(
            f"all {len(rollouts)} rollouts of step {step} were cut at sampling.max_new_tokens="
            f"{limit}{times}: the student ended none of them. Raise it, or see with `qwen3-distill "
            "config check` whether the template's end of turn is among the tokens that end a "
            "rollout"
        )

    def _note_retries(self, step: int, values: Mapping[str, float]) -> None:
        """Say that the learner had too little memory in a step, and began it again."""
        if values.get("train/memory_retries"):
            tokens = int(values["train/micro_batch_tokens"])
            self._progress.note(
                f"the learner ran out of memory in step {step} and began it again: it goes on with "
                f"micro-batches of at most {tokens} tokens. Lower training.micro_batch_tokens, or "
                "raise its share (training.memory_gib, planning)"
            )

    def _save_rollouts(self, step: int, scored: Sequence[TrainingRollout]) -> None:
        logging = self._config.logging
        if step % logging.rollouts_every_steps and step != self._config.steps - 1:
            return
        self._folder.rollouts.mkdir(exist_ok=True)
        kept = [(step, item) for item in scored[: logging.rollouts_per_save]]
        path = rollout_file(self._folder.rollouts, step)
        write_training(path, kept, self._parts.text.decode)
        remove_old_rollouts(self._folder.rollouts, step, logging)


def _watch_fleets(parts: Parts, trace: Trace) -> FleetRates:
    """Have engines and ranks of a cluster recorded from now on."""
    if parts.cluster is not None:
        trace.add_members(parts.cluster.members)
        parts.cluster.observe(trace.member)
    return FleetRates(parts.counters)


def _is_cut(rollout: Rollout, limit: int) -> bool:
    """Whether a rollout reached the limit. A prefix budget's shorter limit does not count."""
    is_full = rollout.continues_at + rollout.num_tokens >= limit
    return is_full and rollout.finish_reason is FinishReason.LENGTH


def _build_evaluator(parts: Parts, progress: ProgressReporter) -> Evaluator | None:
    config, evaluation = parts.config, parts.config.evaluation
    if evaluation is None:
        return None
    return Evaluator(
        evaluation,
        student=parts.engine,
        teacher_sampler=parts.teacher_sampler,
        problems=build_problems(config.student, evaluation, parts.text),
        is_correct=build_checker(evaluation.verifier, parts.text),
        total_steps=config.steps,
        seed=config.seed,
        say=progress.stage,
    )
