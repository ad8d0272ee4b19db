"""The stages one by one, through Parquet files. Together they equal the pipeline's steps exactly.

`generate` writes the rollouts of some steps, `score` adds the teacher's scores, `train` takes the
optimizer steps. Each uses the pipeline's own functions.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count, groupby
from pathlib import Path
from typing import Any, TypeVar

from qwen3_distill.config import RunConfig
from qwen3_distill.data.rollout_files import (
    read_rollouts,
    read_scored,
    read_training,
    write_rollouts,
    write_scored,
)
from qwen3_distill.errors import ConfigError, DataError, NonFiniteError
from qwen3_distill.evaluation.accuracy import EvaluationResult, evaluate
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.modeling.shapes import read_shape
from qwen3_distill.modeling.student_directory import check_student
from qwen3_distill.pipeline import step as pipeline_step
from qwen3_distill.pipeline.assembly.data import (
    build_checker,
    build_problems,
    build_prompts,
    build_training_stream,
    check_problems,
)
from qwen3_distill.pipeline.assembly.engines import build_learner, static_engine, static_samplers
from qwen3_distill.pipeline.assembly.machine import require_machine
from qwen3_distill.pipeline.assembly.plan import plan_memory
from qwen3_distill.pipeline.assembly.teachers import (
    build_teacher,
    require_frozen_teacher,
    with_embedded_teacher_here,
)
from qwen3_distill.pipeline.assembly.views import checked_view, has_context, refuse_own_tokenizer
from qwen3_distill.pipeline.disk_space import check_student_space
from qwen3_distill.pipeline.file_context import check_scored_by, in_own_context
from qwen3_distill.pipeline.first_prompt import template_notes
from qwen3_distill.pipeline.manifest import recorded_identity
from qwen3_distill.pipeline.models import local_model, localize, localize_again
from qwen3_distill.pipeline.own_folder import (
    input_paths,
    refuse_inputs_as_output,
    require_own_folder,
)
from qwen3_distill.pipeline.parts import TextTools
from qwen3_distill.pipeline.requests import make_batch, requests_for_step
from qwen3_distill.pipeline.run_folder import full_disk_named
from qwen3_distill.pipeline.sampler_check import (
    check_sampled_by_student,
    require_ratio_off_policy,
)
from qwen3_distill.ports import Learner, Sampler
from qwen3_distill.recording.text import clock, temperature_text
from qwen3_distill.scoring.handshake import check_compatible
from qwen3_distill.types import Batch, Rollout, ScoredRollout, TrainingRollout
from qwen3_distill.utils.files import check_writable, content_of, is_replaceable, write_json_atomic
from qwen3_distill.utils.seeds import derive_seed
from qwen3_distill.utils.signals import ctrl_c_ignored, signals_as_ctrl_c, stop_on_ctrl_c

Say = Callable[[str], None]
Record = TypeVar("Record")


def offline_file(config: RunConfig, name: str) -> Path:
    """The default path of a stage's file.

    Raises:
        RunFolderError: ``output_dir`` holds files of something else.
    """
    require_own_folder(config.output_path)
    return config.output_path / "offline" / name


@contextmanager
def keep_partial_results(
    write: Callable[[Path], None], rows: Sequence[object], out: Path, say: Say
) -> Iterator[None]:
    """Write the rows that the block collects to ``out``.

    If the block fails or a signal ends it (SIGTERM and SIGHUP act like Ctrl-C), the rows so far
    are written to ``<out>-partial``, or ``-partial-2`` if that exists. A file that cannot be
    written goes to the system's folder for temporary files instead.
    """
    part = out.with_name(f"{out.stem}-partial{out.suffix}")
    if not is_replaceable(out):  # beside a device or a pipe is no place for files
        part = Path(tempfile.gettempdir()) / f"{part.stem}.parquet"
    part = _unused(part.parent, part.stem, part.suffix)

    def keep(path: Path) -> None:
        try:
            write(path)
        except OSError:
            with suppress(OSError):
                spare = _unused(Path(tempfile.gettempdir()), part.stem, part.suffix)
                write(spare)
                say(f"{path} could not be written: its {len(rows)} rollouts are in {spare}")
            raise

    with signals_as_ctrl_c():
        try:
            yield
        except BaseException:
            with ctrl_c_ignored():
                if rows:
                    keep(part)
                    say(f"broken off: the {len(rows)} rollouts of finished steps are in {part}")
            raise
        with ctrl_c_ignored():
            keep(out)


def _unused(folder: Path, stem: str, suffix: str = "") -> Path:
    """The first path in ``folder`` that is not taken: the plain name, or one with a number."""
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    paths = (folder / f"{name}{suffix}" for name in names)
    return next(path for path in paths if not path.exists())


def generate(config: RunConfig, out: Path, *, first_step: int, num_steps: int, say: Say) -> str:
    """Sample the rollouts of some steps, from the student's directory or the teacher.

    Returns:
        A line for the user: how much was written, and where.
    """
    if not config.rollouts.samplers:
        raise ConfigError(
            "rollouts.source=file: nothing is sampled; set rollouts.source to student, teacher or "
            "mixture"
        )
    require_machine(config, ("generation",))
    config = (local := localize(config, say=say, warn=say)).config
    refuse_inputs_as_output(out, input_paths(config))
    text = TextTools(config.student.model)
    prompts = build_prompts(config, text)
    for note in prompts.notes:
        say(note)
    check_writable(out)
    for note in template_notes(config, text):
        say(f"note: {note}")
    local.fetch_weights(say, sorted(config.rollouts.samplers))
    rows: list[tuple[int, Rollout]] = []

    async def sample() -> None:
        async with static_samplers(config) as samplers:
            for step in range(first_step, first_step + num_steps):
                taken = prompts.take(step * config.prompts_per_step, config.prompts_per_step)
                requests = requests_for_step(config, taken, step)
                first = step * config.rollouts_per_step
                rollouts = await pipeline_step.sample(config, *samplers, requests, first)
                rows.extend((step, rollout) for rollout in rollouts)
                say(f"step {step}: {len(rollouts)} rollouts")

    with keep_partial_results(lambda path: write_rollouts(path, rows, text.decode), rows, out, say):
        asyncio.run(sample())
    return f"{len(rows)} rollouts, {sum(r.num_tokens for _, r in rows):,} tokens: {out}"


def score(config: RunConfig, rollouts: Path, out: Path, *, say: Say) -> str:
    """Score every rollout of a file, step by step.

    Returns:
        A line for the user: how much was written, and where.
    """
    require_frozen_teacher(config)
    if config.objective.score_request is None:
        raise ConfigError(
            f"objective.kind={config.objective.kind} needs no scores; train on the rollouts as "
            "they are, or set the objective that the scores are for"
        )
    refuse_own_tokenizer(config, "the command `score`")
    require_machine(config, ("scoring",))
    config = (local := localize(config, say=say, warn=say)).config
    refuse_inputs_as_output(out, {**input_paths(config), "--rollouts": rollouts})
    student = load_identity(config.student.model, weights=False)
    rows = read_rollouts(rollouts, vocab_size=student.vocab_size)
    if not rows:
        raise DataError(f"{rollouts} has no rollouts to score")
    text = TextTools(config.student.model)
    given = in_own_context(
        [rollout for _, rollout in rows],
        rollouts,
        lambda: build_training_stream(config, text),
        has=has_context(config),
    )
    rows = [(step, rollout) for (step, _), rollout in zip(rows, given, strict=True)]
    view = checked_view(config, given)
    local.fetch_weights(say, ("teacher",))
    teacher = build_teacher(config, plan_memory(config))
    decode = text.decode
    check_writable(out)
    scored: list[tuple[int, ScoredRollout]] = []

    async def score_steps() -> None:
        try:
            await teacher.start()
            for step, group in _steps(rows):
                items = await pipeline_step.score(teacher, view, group)
                scored.extend((step, item) for item in items if isinstance(item, ScoredRollout))
                say(f"step {step}: {len(items)} of {len(group)} rollouts scored")
        finally:
            await teacher.close()

    with keep_partial_results(lambda path: write_scored(path, scored, decode), scored, out, say):
        asyncio.run(score_steps())
    return f"{len(scored)} rollouts scored by {teacher.teacher_id}: {out}"


def train(config: RunConfig, scored: Path, out: Path, *, say: Say, off_policy: bool = False) -> str:
    """Train on a file of scored rollouts, one optimizer step for each step in it.

    The first Ctrl-C, SIGTERM or SIGHUP finishes the step, a second one stops at once. After the
    first, or when a step fails, the student so far is written to ``<out>-partial``.

    Args:
        off_policy: the rollouts may have been sampled by other weights than the student's.

    Returns:
        A line for the user: the number of steps, and where the student is.
    """
    if config.replay is not None:
        raise ConfigError(
            "this config has a `replay` section, but the offline stage trains once on each "
            "rollout; set replay=null"
        )
    require_frozen_teacher(config)
    refuse_own_tokenizer(config, "the command `train`")
    if off_policy:
        require_ratio_off_policy(config)
    _require_empty(out)
    require_machine(config, ("training",))
    config = (local := localize(config, say=say, warn=say)).config
    needs_scores = config.objective.score_request is not None
    rows, text = _read_rows(config, scored), TextTools(config.student.model)
    local.fetch_weights(say)
    check_student(config.student.model)
    plan = plan_memory(config)
    # Not started: for its id and head.
    teacher = build_teacher(with_embedded_teacher_here(config), plan) if needs_scores else None
    if teacher is not None:
        check_scored_by(teacher, rows, scored, config, text)
    check_student_space(config, out)
    is_correct = build_checker(config.verifier, text) if config.verifier else None
    learner = build_learner(config, teacher, plan)
    batches = _batches(config, rows, is_correct)

    async def update_steps() -> int:
        try:
            await learner.start()
            # Lets an earlier Ctrl-C end it: an embedded learner never yields.
            await asyncio.sleep(0)
            if not off_policy:
                rollouts = [item.rollout for _, item in rows]
                check_sampled_by_student(rollouts, scored, config, learner.version)
            await _train_and_save(learner, batches, out, say)
            return learner.version.step
        finally:
            if teacher is not None:
                await teacher.close()
            await learner.close()

    with signals_as_ctrl_c():
        return f"student after {asyncio.run(update_steps())} steps: {out}"


def _read_rows(config: RunConfig, scored: Path) -> list[tuple[int, TrainingRollout]]:
    """Read the rollouts to train on, with the scores that the objective needs."""
    vocab_size = load_identity(config.student.model, weights=False).vocab_size
    rows: list[tuple[int, TrainingRollout]]
    if config.objective.score_request is None:
        rows = read_training(scored, vocab_size=vocab_size)
    else:
        one = len(config.teachers) == 1  # only then a head reads hidden states
        hidden_size = read_shape(config.teacher.model).hidden_size if one else None
        rows = [*read_scored(scored, vocab_size=vocab_size, hidden_size=hidden_size)]
    if not rows:
        raise DataError(f"{scored} has no rollouts to train on")
    return rows


def _batches(
    config: RunConfig,
    rows: Sequence[tuple[int, TrainingRollout]],
    is_correct: Callable[[Rollout], float] | None,
) -> Iterator[tuple[int, Batch]]:
    """Make a batch of each step's rollouts; scores that the objective does not need are left."""
    objective = config.objective
    for step, group in _steps(rows):
        if objective.score_request is None:
            group = [TrainingRollout(rollout=item.rollout) for item in group]
        yield (
            step,
            make_batch(
                group,
                task_reward_weight=objective.reward_weight,
                is_correct=is_correct,
                scale=objective.group_scale,
            ),
        )


class _Stopped(KeyboardInterrupt):
    """Stopped by a signal between two steps: the weights are those of a finished step."""


async def _train_and_save(
    learner: Learner, batches: Iterable[tuple[int, Batch]], out: Path, say: Say
) -> None:
    """Update with each batch and save the student.

    Raises:
        KeyboardInterrupt: a signal asked to stop. Then, as after a failed step, the student so
            far is in ``<out>-partial``.
    """
    stopping, finished = False, 0

    def stop() -> None:
        nonlocal stopping
        stopping = True
        say("stopping after this step (again to stop at once)")

    with stop_on_ctrl_c(stop):
        try:
            for step, batch in batches:
                if stopping:
                    raise _Stopped
                update = await learner.update(batch)
                finished += 1
                say(f"step {step}: loss {update.loss:.5f}, gradient norm {update.grad_norm:.4f}")
        except (Exception, _Stopped):
            await _save_part(learner, finished, out, say)
            raise
        await _save_whole(learner, finished, out, say)


async def _save_whole(learner: Learner, num_steps: int, out: Path, say: Say) -> None:
    """Save the student; where ``out`` cannot be written, in the folder for temporary files."""
    try:
        with full_disk_named(out):
            await learner.save_student(out)
    except OSError:
        spare = _unused(Path(tempfile.gettempdir()), Path(os.path.abspath(out)).name)
        with suppress(OSError, RuntimeError):  # must not hide the first error
            await learner.save_student(spare)
            say(f"{out} could not be written: the student after {num_steps} steps is in {spare}")
        raise


async def _save_part(learner: Learner, num_steps: int, out: Path, say: Say) -> None:
    """Save the student after the finished steps in a new folder ``<out>-partial``."""
    if num_steps == 0:
        return
    whole = Path(os.path.abspath(out))  # so that "." has a name too
    part = _unused(whole.parent, f"{whole.name}-partial")
    with ctrl_c_ignored():
        try:
            with full_disk_named(part):
                await learner.save_student(part)
            say(f"broken off: the student after {num_steps} finished steps is in {part}")
        except (OSError, RuntimeError, NonFiniteError) as error:  # must not hide the first error
            say(f"broken off: the student after {num_steps} finished steps is lost: {error}")


def _require_empty(folder: Path) -> None:
    """Check that a student can be written to ``folder`` without replacing anything."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose a new directory for the trained student")
    if folder.is_symlink() and not folder.exists():
        raise ConfigError(f"{folder} is a link to nowhere; choose a new directory for the student")
    if content_of(folder):
        raise ConfigError(f"{folder} is not empty; choose a new directory for the trained student")
    check_writable(folder / "config.json" if folder.exists() else folder)


def _find_models(
    config: RunConfig, model: str, run_folder: Path | None, say: Say
) -> tuple[RunConfig, str]:
    """Find the config's models and ``model``, on the hub or here, and check that they match.

    Returns:
        The config with directories, and the directory of ``model`` with its weights.
    """
    recorded = None if run_folder is None else recorded_identity(run_folder)
    if run_folder is None or recorded is None:
        local = localize(config, say=say, warn=say)
    else:
        local = localize_again(config, run_folder / "manifest.json", say=say)
    if model == config.student.model:
        local.fetch_weights(say, ("student",))
        directory = local.config.student.model
    else:
        directory = local_model(model, "--model", say)
    config = local.config
    if recorded is not None and not Path(config.student.model).is_dir():
        check_compatible(recorded, load_identity(directory))
        say(f"student.model={config.student.model} is gone; the tokenizer is that of {model}")
        student = config.student.model_copy(update={"model": directory})
        return config.model_copy(update={"student": student}), directory
    student_identity = load_identity(config.student.model, weights=False)
    check_compatible(student_identity, load_identity(directory))
    return config, directory


def evaluate_directory(
    config: RunConfig, model: str, out: Path | None, *, say: Say, run_folder: Path | None = None
) -> None:
    """Measure a model directory's held-out accuracy; report it, and write it to ``out``, if any.

    Args:
        run_folder: the folder whose config this is. Where the config's student is gone, ``model``
            is compared with the student that the manifest records.
    """
    settings = config.evaluation
    if settings is None:
        raise ConfigError("this config has no `evaluation` section")
    if out is not None:
        refuse_inputs_as_output(out, {**input_paths(config), "--model": model})
        check_writable(out)
    require_machine(config, ("generation",))
    config, directory = _find_models(config, model, run_folder, say)
    settings = config.evaluation or settings  # a dataset has its commit now
    if out is not None:
        refuse_inputs_as_output(out, {**input_paths(config), "--model": directory})
    text = TextTools(config.student.model)
    for note in check_problems(config.student, settings, text).notes:
        say(note)
    count = settings.final_num_problems or settings.num_problems
    problems = build_problems(config.student, settings, text)(count)

    first, second = settings.sampling.temperature, settings.second_temperature

    async def measure(engine: Sampler, temperature: float) -> EvaluationResult:
        at = settings.at_temperature(temperature)
        return await evaluate(
            engine,
            problems,
            build_checker(settings.verifier, text),
            sampling=at.sampling,
            samples_per_problem=at.samples_per_problem,
            seed=derive_seed(config.seed, "evaluation"),
            on_rollout=_every_tenth(say),
        )

    async def measure_all() -> dict[str, Any]:
        async with static_engine(config, directory) as engine:
            result = await measure(engine, first)
            say(_accuracy_line(model, result))  # before the file, which may fail to be written
            record: dict[str, Any] = {"model": model, **result.record()}
            if second is not None:
                again = await measure(engine, second)
                say(_accuracy_line(f"{model}, {temperature_text(second)}", again))
                record["second"] = {"temperature": second, **again.record()}
            return record

    say(f"evaluating {model} on {len(problems)} problems")
    with signals_as_ctrl_c():
        record = asyncio.run(measure_all())
    if out is not None:
        write_json_atomic(out, record)


def _accuracy_line(name: str, result: EvaluationResult) -> str:
    return (
        f"{name}: {result.accuracy:.1%} [{result.ci_low:.1%}, {result.ci_high:.1%}] on "
        f"{result.num_problems} problems, {result.mean_tokens:.1f} tokens on average, "
        f"{result.truncated_fraction:.1%} truncated"
    )


def _every_tenth(say: Say) -> Callable[[int, int], None]:
    """After every tenth of the answers, report how many there are and the time left."""
    started = time.monotonic()

    def count_answer(done: int, total: int) -> None:
        if done == total or 10 * done // total == 10 * (done - 1) // total:
            return
        elapsed_s = max(time.monotonic() - started, 1e-9)
        left = clock(elapsed_s / done * (total - done))
        say(f"{done:,} of {total:,} answers, {done / elapsed_s:.1f} a second, {left} left")

    return count_answer


def _steps(rows: Sequence[tuple[int, Record]]) -> Iterator[tuple[int, list[Record]]]:
    """Group consecutive rows by step."""
    for step, group in groupby(rows, key=lambda row: row[0]):
        yield step, [record for _, record in group]
