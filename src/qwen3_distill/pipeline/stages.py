"""The stages offline, through Parquet files. Together they do exactly what pipeline steps do.

`generate` writes what a step samples, `score` adds what the teacher says, `train` takes the
optimizer steps. Each uses the same functions as the pipeline.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from qwen3_distill.config import RunConfig
from qwen3_distill.data.rollout_files import (
    read_rollouts,
    read_scored,
    write_rollouts,
    write_scored,
)
from qwen3_distill.errors import ConfigError, DataError
from qwen3_distill.evaluation.accuracy import EvaluationResult, evaluate
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.pipeline import sequential
from qwen3_distill.pipeline.build import (
    TextTools,
    build_checker,
    build_learner,
    build_problems,
    build_prompts,
    build_teacher,
    in_this_process,
    plan_memory,
    static_engine,
    task_reward_weight,
)
from qwen3_distill.pipeline.requests import make_batch, requests_for_step
from qwen3_distill.pipeline.run_folder import full_disk_named
from qwen3_distill.scoring.handshake import check_compatible
from qwen3_distill.types import Rollout, ScoredRollout
from qwen3_distill.utils.files import check_writable, write_json_atomic
from qwen3_distill.utils.seeds import derive_seed

Say = Callable[[str], None]
Record = TypeVar("Record")


def offline_file(config: RunConfig, name: str) -> Path:
    """Where a stage's file lies unless told otherwise."""
    return config.output_path / "offline" / name


@contextmanager
def _written(
    write: Callable[[Path], None], rows: Sequence[object], out: Path, say: Say
) -> Iterator[None]:
    """Write what the block collects; where it is broken off, the finished steps beside ``out``."""
    try:
        yield
    except BaseException:
        if rows:
            part = out.with_name(f"{out.stem}-partial{out.suffix}")
            write(part)
            say(f"broken off: the {len(rows)} rollouts of finished steps are in {part}")
        raise
    write(out)


def generate(config: RunConfig, out: Path, *, first_step: int, num_steps: int, say: Say) -> str:
    """Sample the rollouts of some steps from the student's directory.

    Returns:
        A line about what was written.
    """
    text = TextTools(config.student.model)
    prompts = build_prompts(config, text)
    check_writable(out)
    rows: list[tuple[int, Rollout]] = []

    async def sample() -> None:
        async with static_engine(config, config.student.model) as engine:
            for step in range(first_step, first_step + num_steps):
                taken = prompts.take(step * config.prompts_per_step, config.prompts_per_step)
                requests = requests_for_step(config, taken, step)
                rollouts = await sequential.generate(engine, requests)
                rows.extend((step, rollout) for rollout in rollouts)
                say(f"step {step}: {len(rollouts)} rollouts")

    with _written(lambda path: write_rollouts(path, rows, text.decode), rows, out, say):
        asyncio.run(sample())
    return f"{len(rows)} rollouts, {sum(r.num_tokens for _, r in rows):,} tokens: {out}"


def score(config: RunConfig, rollouts: Path, out: Path, *, say: Say) -> str:
    """Score every rollout of a file, step by step.

    Returns:
        A line about what was written.
    """
    rows = read_rollouts(rollouts)
    if not rows:
        raise DataError(f"{rollouts} has no rollouts to score")
    check_compatible(load_identity(config.student.model), load_identity(config.scoring.model))
    teacher = build_teacher(config, plan_memory(config))
    allowed = sequential.max_dropped_fraction(config)
    decode = TextTools(config.student.model).decode
    check_writable(out)
    scored: list[tuple[int, ScoredRollout]] = []

    async def score_steps() -> None:
        try:
            await teacher.start()
            for step, group in _steps(rows):
                items = await sequential.score(teacher, group, max_dropped_fraction=allowed)
                scored.extend((step, item) for item in items)
                say(f"step {step}: {len(items)} of {len(group)} rollouts scored")
        finally:
            await teacher.close()

    with _written(lambda path: write_scored(path, scored, decode), scored, out, say):
        asyncio.run(score_steps())
    return f"{len(scored)} rollouts scored by {teacher.teacher_id}: {out}"


def train(config: RunConfig, scored: Path, out: Path, *, say: Say) -> str:
    """Take one optimizer step per step in a file of scored rollouts; write the student.

    Returns:
        A line about what was written.
    """
    rows = read_scored(scored)
    if not rows:
        raise DataError(f"{scored} has no rollouts to train on")
    plan = plan_memory(config)
    teacher = build_teacher(in_this_process(config), plan)  # not started: who it is, and its head
    strangers = {item.score.teacher_id for _, item in rows} - {teacher.teacher_id}
    if strangers:
        raise DataError(
            f"{scored} was scored by {', '.join(sorted(strangers))}, but the config's teacher is "
            f"{teacher.teacher_id}"
        )
    _require_empty(out)
    text = TextTools(config.student.model)
    is_correct = build_checker(config.verifier, text) if config.verifier else None
    weight = task_reward_weight(config)
    learner = build_learner(config, teacher, plan)

    async def update_steps() -> int:
        try:
            await learner.start()
            for step, group in _steps(rows):
                batch = make_batch(group, task_reward_weight=weight, is_correct=is_correct)
                update = await learner.update(batch)
                say(f"step {step}: loss {update.loss:.5f}, gradient norm {update.grad_norm:.4f}")
            with full_disk_named(out):
                await learner.save_student(out)
            return learner.version.step
        finally:
            await teacher.close()
            await learner.close()

    return f"student after {asyncio.run(update_steps())} steps: {out}"


def _require_empty(folder: Path) -> None:
    """That a student can be written there, and nothing is replaced by it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; choose a new directory for the trained student")
    check_writable(folder / "config.json" if folder.exists() else folder)


def evaluate_directory(config: RunConfig, model: str, out: Path | None, *, say: Say) -> str:
    """Held-out accuracy of a model directory.

    Returns:
        A line with the result.
    """
    settings = config.evaluation
    if settings is None:
        raise ConfigError("this config has no `evaluation` section")
    check_compatible(load_identity(config.student.model), load_identity(model))
    if out is not None:
        check_writable(out)
    text = TextTools(config.student.model)
    count = settings.final_num_problems or settings.num_problems
    problems = build_problems(config, settings, text)(count)

    async def measure() -> EvaluationResult:
        async with static_engine(config, model) as engine:
            return await evaluate(
                engine,
                problems,
                build_checker(settings.verifier, text),
                sampling=settings.sampling,
                samples_per_problem=settings.samples_per_problem,
                seed=derive_seed(config.seed, "evaluation"),
            )

    say(f"evaluating {model} on {len(problems)} problems")
    result = asyncio.run(measure())
    if out is not None:
        write_json_atomic(out, {"model": model, **asdict(result)})
    return (
        f"{model}: {result.accuracy:.1%} [{result.ci_low:.1%}, {result.ci_high:.1%}] on "
        f"{result.num_problems} problems, {result.mean_tokens:.1f} tokens on average, "
        f"{result.truncated_fraction:.1%} truncated"
    )


def _steps(rows: Sequence[tuple[int, Record]]) -> Iterator[tuple[int, list[Record]]]:
    """Consecutive rows of one step."""
    for step, group in groupby(rows, key=lambda row: row[0]):
        yield step, [record for _, record in group]
