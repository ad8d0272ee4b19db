"""The command line. Thin: read the config, build, run, and turn errors into one line."""

import os

# Threads that wait for each other spin for milliseconds by default. Where another process wants the
# same cores that made steps several times slower; a short spin costs little on idle cores.
# Must be set before torch loads its OpenMP runtime.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import errno
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

import qwen3_distill
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import dump_config, load_config
from qwen3_distill.errors import DistillError, RunFolderError

app = typer.Typer(
    name="qwen3-distill",
    help="On-policy distillation: a student samples, a teacher scores every token, the student "
    "learns.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Look at configs and their schema.", no_args_is_help=True)
app.add_typer(config_app, name="config")


def _print_version(asked: bool) -> None:
    if asked:
        _say(f"qwen3-distill {qwen3_distill.__version__}")
        raise typer.Exit


def _refuse_nan(value: float | None) -> float | None:
    """A range lets NaN through: no comparison with it holds."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is not a number of GiB")
    return value


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    pass


ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="YAML file, or a run folder's config.json.")
]
_MAX_STEPS = 2**31 - 1
"""Of the options that count steps: their numbers have to fit in a rollout file."""

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.SUB=VALUE]...",
        help="Settings that replace the file's, e.g. seed=1 training.optimizer.learning_rate=2e-3.",
        show_default=False,
    ),
]


@app.command()
def run(config: ConfigOption, overrides: Overrides = None) -> None:
    """Distil: generate, score and train for all steps, then evaluate and report.

    Started again, a run goes on from its newest checkpoint. The first Ctrl-C finishes the step
    and saves; exit status 130.
    """
    settings = load_config(config, overrides or ())
    from qwen3_distill.pipeline.run import INTERRUPTED_EXIT_CODE
    from qwen3_distill.pipeline.run import run as run_pipeline
    from qwen3_distill.recording.console import make_reporter

    _quiet_libraries()
    try:
        if run_pipeline(settings, make_reporter(settings.steps), _warn) is not None:
            return
        _warn("stopped and saved; start the same command again to go on")
    except KeyboardInterrupt:
        _warn("stopped at once; the same command goes on from the newest checkpoint, if any")
    raise typer.Exit(INTERRUPTED_EXIT_CODE)


@app.command()
def generate(
    config: ConfigOption,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Default: offline/rollouts.parquet in output_dir.")
    ] = None,
    step: Annotated[
        int, typer.Option(min=0, max=_MAX_STEPS, help="Whose prompts and seeds to use.")
    ] = 0,
    num_steps: Annotated[
        int, typer.Option(min=1, max=_MAX_STEPS, help="How many steps' rollouts.")
    ] = 1,
) -> None:
    """Offline stage 1: sample rollouts from the student's directory into a Parquet file."""
    settings = load_config(config, overrides or ())
    from qwen3_distill.pipeline import offline as stages

    _quiet_libraries()
    target = out or stages.offline_file(settings, "rollouts.parquet")
    _say(stages.generate(settings, target, first_step=step, num_steps=num_steps, say=_say))


@app.command()
def score(
    config: ConfigOption,
    overrides: Overrides = None,
    rollouts: Annotated[
        Path | None,
        typer.Option(help="File of `generate`; default: offline/rollouts.parquet in output_dir."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Default: offline/scored.parquet in output_dir.")
    ] = None,
) -> None:
    """Offline stage 2: add the teacher's scores to a file of rollouts."""
    settings = load_config(config, overrides or ())
    from qwen3_distill.pipeline import offline as stages

    _quiet_libraries()
    source = rollouts or stages.offline_file(settings, "rollouts.parquet")
    target = out or stages.offline_file(settings, "scored.parquet")
    _say(stages.score(settings, source, target, say=_say))


@app.command()
def train(
    config: ConfigOption,
    overrides: Overrides = None,
    scored: Annotated[
        Path | None,
        typer.Option(help="File of `score`; default: offline/scored.parquet in output_dir."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for the student; default: offline/student in output_dir."),
    ] = None,
) -> None:
    """Offline stage 3: one optimizer step per step in a file of scored rollouts.

    The first Ctrl-C finishes the step and saves the student so far; exit status 130.
    """
    settings = load_config(config, overrides or ())
    from qwen3_distill.pipeline import offline as stages

    _quiet_libraries()
    source = scored or stages.offline_file(settings, "scored.parquet")
    target = out or stages.offline_file(settings, "student")
    _say(stages.train(settings, source, target, say=_say))


@app.command("eval")
def evaluate(
    config: ConfigOption,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Model directory; default: the config's student.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result as JSON.")] = None,
) -> None:
    """Held-out accuracy of a model directory, by the config's evaluation section."""
    settings = load_config(config, overrides or ())
    from qwen3_distill.pipeline import offline as stages

    _quiet_libraries()
    stages.evaluate_directory(settings, model or settings.student.model, out, say=_say)


@app.command("audit-teacher")
def audit_teacher(
    config: ConfigOption,
    overrides: Overrides = None,
    rollouts: Annotated[
        Path | None,
        typer.Option(help="File of `generate`; default: rollouts of the config's first steps."),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="How many rollouts to score.")] = 64,
    unquantized: Annotated[
        str | None,
        typer.Option(help="Directory to compare with; default: the config's teacher."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """What the teacher's quantization does to its scores, on a fixed sample of rollouts."""
    settings = load_config(config, overrides or ())
    from qwen3_distill.doctor.precision import audit_teacher as audit

    _quiet_libraries()
    _say(audit(settings, rollouts, out, num_rollouts=num, unquantized=unquantized, say=_say))


@app.command()
def plan(
    config: ConfigOption,
    overrides: Overrides = None,
    shape_student: Annotated[
        str | None, typer.Option(help="Plan with this Qwen3, e.g. 4B, instead of the directory.")
    ] = None,
    shape_teacher: Annotated[
        str | None, typer.Option(help="The same for the teacher, e.g. 32B or 32B-FP8.")
    ] = None,
    device_memory_gib: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1_000_000,
            callback=_refuse_nan,
            help="Plan for so much instead of what is free now.",
        ),
    ] = None,
) -> None:
    """Who gets how much memory. Exit status 2, and what would help, where it does not fit."""
    settings = load_config(config, overrides or ())
    from qwen3_distill.modeling.shapes import named_shape
    from qwen3_distill.planning.plan import make_plan
    from qwen3_distill.planning.table import plan_settings, plan_table

    planned = make_plan(
        settings,
        device_memory_bytes=None if device_memory_gib is None else int(device_memory_gib * 2**30),
        student_shape=None if shape_student is None else named_shape(shape_student),
        teacher_shape=None if shape_teacher is None else named_shape(shape_teacher),
    )
    Console().print(plan_table(planned))
    _say(f"planned settings: {plan_settings(settings, planned)}")


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(help="A run folder, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the folder.")] = None,
) -> None:
    """Write a run's report.html again from its records."""
    config_file = run_folder / "config.json"
    if not config_file.is_file():
        raise RunFolderError(f"{run_folder} is not a run folder: it has no config.json")
    settings = load_config(config_file)
    from qwen3_distill.pipeline.recorder import render_report

    _quiet_libraries()
    _say(f"report: {render_report(run_folder, settings, out)}")


@config_app.command("show")
def config_show(config: ConfigOption, overrides: Overrides = None) -> None:
    """Print the resolved config, defaults included, as JSON."""
    _print_json(dump_config(load_config(config, overrides or ())))


@config_app.command("check")
def config_check(config: ConfigOption, overrides: Overrides = None) -> None:
    """Check a config, and that its models, prompts and interpreters are there.

    Nothing is loaded or started. Exit status 2 when something is missing.
    """
    settings = load_config(config, overrides or ())
    _say(
        f"{config} is valid: {settings.steps} steps of {settings.prompts_per_step} prompts x "
        f"{settings.samples_per_prompt} samples, objective {settings.objective.kind}"
    )
    from qwen3_distill.pipeline.preflight import check_before_start

    check_before_start(settings)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a config, for editors and tools."""
    _print_json(RunConfig.model_json_schema())


@config_app.command("reference")
def config_reference() -> None:
    """Print the configuration reference (docs/configuration.md)."""
    from qwen3_distill.config.reference import config_reference

    sys.stdout.write(config_reference(RunConfig))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors of this package become one line and their exit status.

    Args:
        arguments: the command line without the program's name; default: the process's.
    """
    try:
        app(None if arguments is None else list(arguments))
    except DistillError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        advice = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            advice = (
                "; free space or choose another place. Nothing that was saved is lost: the same "
                "command goes on from there"
            )
        _fail(f"{error.strerror}{where}{advice}", 2)


def _fail(message: str, exit_code: int) -> NoReturn:
    Console(stderr=True).print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(exit_code)


def _warn(message: str) -> None:
    Console(stderr=True).print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)


def _say(message: str) -> None:
    Console().print(message, markup=False, highlight=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _quiet_libraries() -> None:
    """No bars and advice of transformers between our own lines; its errors are still raised."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
