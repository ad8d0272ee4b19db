"""The command that examines a config and its engines before a run."""

from typing import Annotated

import typer
from rich.console import Console

from qwen3_distill.cli.terminal import (
    ConfigOption,
    Overrides,
    begin_work,
    model_option,
    print_json,
)
from qwen3_distill.config.load import load_config
from qwen3_distill.recording.console import make_reporter

FAILED_EXIT_CODE = 4
"""Exit status if a check failed; 2 and 3 are those of errors."""
WIDTH = 140
"""Columns of the table in a file or a pipe."""


def doctor(
    config: ConfigOption,
    overrides: Overrides = None,
    engines: Annotated[
        bool,
        typer.Option(
            "--engines/--no-engines", help="Also start the engines for a short real pass."
        ),
    ] = True,
    rollouts: Annotated[
        int, typer.Option(min=2, max=1024, help="How many rollouts the engines sample.")
    ] = 8,
    unquantized: Annotated[
        str | None,
        model_option("The teacher before it was quantized, where the config's directory is FP8."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check a config, this machine, the data and the engines; say what to change.

    Exit status 0 if nothing failed, 4 if a check failed. What is trained meanwhile is thrown away.
    """
    settings = load_config(config, overrides or ())
    from qwen3_distill.doctor.diagnosis import diagnose
    from qwen3_distill.doctor.table import print_table

    begin_work()
    console = Console(stderr=True, highlight=False)
    with make_reporter(1, console=console) as progress:
        diagnosis = diagnose(
            settings,
            engines=engines,
            num_rollouts=rollouts,
            unquantized=unquantized,
            say=progress.stage,
            tell=lambda finding: None,
        )
    if as_json:
        print_json(diagnosis.record())
    else:
        out = Console(highlight=False)
        if not out.is_terminal:  # rich would assume 80 columns
            out = Console(highlight=False, width=WIDTH)
        print_table(diagnosis, out)
    if diagnosis.failed:
        raise typer.Exit(FAILED_EXIT_CODE)
