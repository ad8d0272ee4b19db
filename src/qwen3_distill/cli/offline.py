"""Commands that run one engine without a run folder: offline stages, evaluation, audit."""

from pathlib import Path
from typing import Annotated

import typer

from qwen3_distill.cli.terminal import (
    ConfigOption,
    Overrides,
    begin_work,
    model_option,
    path_option,
    say,
)
from qwen3_distill.config.load import load_config

_MAX_STEPS = 2**31 - 1
"""Limit of options that count steps: step numbers must fit in a rollout file."""


def generate(
    config: ConfigOption,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, path_option("Default: offline/rollouts.parquet in output_dir.")
    ] = None,
    step: Annotated[int, typer.Option(min=0, max=_MAX_STEPS, help="The first step to sample.")] = 0,
    num_steps: Annotated[
        int, typer.Option(min=1, max=_MAX_STEPS, help="Number of steps to sample.")
    ] = 1,
) -> None:
    """Offline stage 1: sample rollouts from the student's directory into a Parquet file."""
    settings = load_config(config, overrides or ())
    from qwen3_distill.pipeline import offline

    begin_work()
    target = out or offline.offline_file(settings, "rollouts.parquet")
    say(offline.generate(settings, target, first_step=step, num_steps=num_steps, say=say))


def score(
    config: ConfigOption,
    overrides: Overrides = None,
    rollouts: Annotated[
        Path | None,
        path_option("File of `generate`; default: offline/rollouts.parquet in output_dir."),
    ] = None,
    out: Annotated[
        Path | None, path_option("Default: offline/scored.parquet in output_dir.")
    ] = None,
) -> None:
    """Offline stage 2: add the teacher's scores to a file of rollouts."""
    settings = load_config(config, overrides or ())
    from qwen3_distill.pipeline import offline

    begin_work()
    source = rollouts or offline.offline_file(settings, "rollouts.parquet")
    target = out or offline.offline_file(settings, "scored.parquet")
    say(offline.score(settings, source, target, say=say))


def train(
    config: ConfigOption,
    overrides: Overrides = None,
    scored: Annotated[
        Path | None, path_option("File of `score`; default: offline/scored.parquet in output_dir.")
    ] = None,
    out: Annotated[
        Path | None,
        path_option("Directory for the student; default: offline/student in output_dir."),
    ] = None,
    off_policy: Annotated[
        bool, typer.Option("--off-policy", help="Accept rollouts that other weights sampled.")
    ] = False,
) -> None:
    """Offline stage 3: train on a file of scored rollouts, one optimizer step for each step in it.

    The first Ctrl-C finishes the step and saves the student so far; exit status 130.
    """
    settings = load_config(config, overrides or ())
    from qwen3_distill.pipeline import offline

    begin_work()
    source = scored or offline.offline_file(settings, "scored.parquet")
    target = out or offline.offline_file(settings, "student")
    say(offline.train(settings, source, target, say=say, off_policy=off_policy))


def evaluate(
    config: ConfigOption,
    overrides: Overrides = None,
    model: Annotated[
        str | None, model_option("Model directory or hub id; default: the config's student.")
    ] = None,
    out: Annotated[Path | None, path_option("Also write the result as JSON.")] = None,
) -> None:
    """Measure a model directory's held-out accuracy, as the config's evaluation section says."""
    settings = load_config(config, overrides or ())
    from qwen3_distill.pipeline import offline

    begin_work()
    evaluated = model or settings.student.model
    run_folder = config.parent if config.name == "config.json" else None
    offline.evaluate_directory(settings, evaluated, out, say=say, run_folder=run_folder)


def audit_teacher(
    config: ConfigOption,
    overrides: Overrides = None,
    rollouts: Annotated[
        Path | None,
        path_option("File of `generate`; default: rollouts of the config's first steps."),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="How many rollouts to score.")] = 64,
    unquantized: Annotated[
        str | None,
        model_option("Directory or hub id to compare with; default: the config's teacher."),
    ] = None,
    out: Annotated[Path | None, path_option("Also write the figures as JSON.")] = None,
) -> None:
    """Measure how quantization changes the teacher's scores, on a fixed sample of rollouts."""
    settings = load_config(config, overrides or ())
    from qwen3_distill.doctor.precision import audit_teacher as audit
    from qwen3_distill.pipeline.assembly.machine import require_machine

    require_machine(settings, ("scoring",) if rollouts else ("generation", "scoring"))
    begin_work()
    say(audit(settings, rollouts, out, num_rollouts=num, unquantized=unquantized, say=say))
