"""Options and output that the commands share."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="YAML file, or a run folder's config.json.")
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
    Console(stderr=True).print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(exit_code)


def warn(message: str) -> None:
    """Print a note to stderr."""
    Console(stderr=True).print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """Print a line to stdout."""
    Console().print(message, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as JSON to stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def quiet_libraries() -> None:
    """Silence progress bars and advice of transformers; its errors are still raised."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
