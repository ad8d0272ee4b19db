"""Options and output that the commands share."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from qwen3_distill.recording.output import announce_loss
from qwen3_distill.recording.terminal import TerminalConsole, for_terminal
from qwen3_distill.utils.paths import plain_path


def path_of(text: str) -> Path:
    """Read a path of the command line as those of a config are read; for ``parser`` of an option.

    Raises:
        typer.BadParameter: a URL or a variable, with what to write.
    """
    try:
        return Path(plain_path(text))
    except ValueError as error:  # click would drop its text
        raise typer.BadParameter(str(error)) from None


def model_of(text: str) -> str:
    """Read a model of the command line, a path or a hub id, as `path_of` reads paths.

    The text is kept: ``./a/b`` is no hub id.
    """
    path_of(text)
    return plain_path(text)


def model_option(help_text: str) -> Any:
    """Declare an option that takes a model."""
    return typer.Option(parser=model_of, metavar="PATH|ID", help=help_text)


def path_option(help_text: str) -> Any:
    """Declare an option that takes a path."""
    return typer.Option(parser=path_of, metavar="PATH", help=help_text)


ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config",
        "-c",
        parser=path_of,
        metavar="PATH",
        help="YAML file, or a run folder's config.json.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.SUB=VALUE]...",
        help="Settings that replace the file's, e.g. seed=1 training.optimizer.learning_rate=2e-3.",
        show_default=False,
    ),
]


def fail(message: str, exit_code: int) -> NoReturn:
    """Print an error to stderr and exit."""
    _print(f"error: {message}", stderr=True)
    sys.exit(exit_code)


def warn(message: str) -> None:
    """Print a note to stderr."""
    _print(f"note: {message}", stderr=True)


def say(message: str) -> None:
    """Print a line to stdout."""
    _print(message)


def print_json(value: Any) -> None:
    """Print a value as JSON to stdout."""
    sys.stdout.write(json.dumps(value, indent=2).replace("\x7f", "\\u007f") + "\n")


def _print(message: str, *, stderr: bool = False) -> None:
    console = TerminalConsole(stderr=stderr)
    console.print(for_terminal(message), markup=False, highlight=False, soft_wrap=True)


def _name_loss(loss: str) -> None:
    """Name a lost output on the other one."""
    (say if loss.startswith("standard error") else warn)(f"{loss}; the work goes on")


def begin_work() -> None:
    """Prepare a command whose result is files, not what it prints.

    Progress bars and advice of transformers are silenced; its errors are still raised. A closed
    output is named on the other one, and the work goes on.
    """
    announce_loss(_name_loss)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
