"""The command line: registers the commands, turns errors into one line and an exit status."""

import os

# Threads that wait for each other spin for milliseconds by default. Where another process wants the
# same cores that made steps several times slower; a short spin costs little on idle cores.
# Must be set before torch loads its OpenMP runtime.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import errno
from collections.abc import Sequence
from typing import Annotated

import typer

import qwen3_distill
from qwen3_distill.cli import engines, inspect, offline, planning, run, status
from qwen3_distill.cli.cost import cost
from qwen3_distill.cli.doctor import doctor
from qwen3_distill.cli.export import export
from qwen3_distill.cli.init import init
from qwen3_distill.cli.terminal import fail, say
from qwen3_distill.errors import DistillError
from qwen3_distill.recording.output import surviving_output

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
engines_app = typer.Typer(
    help="Install, list and remove the environments of vLLM, SGLang and unsloth.",
    no_args_is_help=True,
)
app.add_typer(engines_app, name="engines")

app.command()(init)
app.command()(run.run)
app.command()(offline.generate)
app.command()(offline.score)
app.command()(offline.train)
app.command("eval")(offline.evaluate)
app.command("audit-teacher")(offline.audit_teacher)
app.command()(doctor)
app.command()(planning.plan)
app.command()(planning.calibrate)
app.command()(inspect.report)
app.command()(cost)
app.command()(export)
app.command()(status.status)
engines_app.command("install")(engines.install)
engines_app.command("list")(engines.list_engines)
engines_app.command("remove")(engines.remove)
config_app.command("show")(inspect.config_show)
config_app.command("check")(inspect.config_check)
config_app.command("schema")(inspect.config_schema)
config_app.command("reference")(inspect.config_reference)


def _print_version(asked: bool) -> None:
    if asked:
        say(f"qwen3-distill {qwen3_distill.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error of this package becomes one line and its exit status.

    A closed terminal or pipe ends no command.

    Args:
        arguments: the command line without the program's name; default: the process's.
    """
    with surviving_output():
        _run(arguments)


def _run(arguments: Sequence[str] | None) -> None:
    try:
        app(None if arguments is None else list(arguments))
    except DistillError as error:
        fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        advice = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            advice = (
                "; free space or choose another place. Nothing that was saved is lost: the same "
                "command continues from there"
            )
        fail(f"{error.strerror}{where}{advice}", 2)


if __name__ == "__main__":
    main()
