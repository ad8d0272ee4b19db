"""The command that shows a run from another terminal."""

from pathlib import Path
from typing import Annotated

import typer

from qwen3_distill.cli.terminal import print_json, say


def status(
    run_folder: Annotated[Path, typer.Argument(help="A run folder: running, stopped or finished.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where a run is: step, rates, time left, last evaluation, what it waits for now.

    Reads only, so a run is not disturbed.
    """
    from qwen3_distill.report.status import run_status, status_lines

    found = run_status(run_folder)
    if as_json:
        print_json(found)
        return
    for line in status_lines(found):
        say(line)
