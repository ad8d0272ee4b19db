"""The command that shows what runs cost, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qwen3_distill.cli.terminal import path_of, print_json, say, warn

if TYPE_CHECKING:
    from qwen3_distill.report.cost_reach import Reached, RunCost


def _levels(texts: Sequence[str]) -> list[float]:
    """Read the levels of ``--reach``, each a number or several with commas.

    Raises:
        typer.BadParameter: one is no number above 0 and up to 1.
    """
    levels: list[float] = []
    for part in ",".join(texts).split(",") if texts else []:
        try:
            level = float(part)
        except ValueError:
            level = float("nan")
        if not 0 < level <= 1:
            raise typer.BadParameter(
                f"{part.strip()!r} is no level; give numbers above 0 and up to 1, e.g. "
                "--reach 0.5,0.8,0.95",
                param_hint="--reach",
            )
        levels.append(level)
    return levels


def cost(
    runs: Annotated[
        list[Path],
        typer.Argument(
            parser=path_of, metavar="RUN_FOLDER...", help="Run folders: running or ended."
        ),
    ],
    reach: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LEVEL[,LEVEL]...",
            help="Show the cost at which accuracy reached these shares of the gap between the "
            "student before training and the teacher, e.g. 0.5,0.8,0.95.",
        ),
    ] = None,
    absolute: Annotated[
        bool, typer.Option("--absolute", help="Levels are accuracies, not shares of the gap.")
    ] = False,
    second: Annotated[
        bool,
        typer.Option("--second", help="Use the evaluations at evaluation.second_temperature."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what runs cost: tokens, FLOPs, device time, bytes, money; and to reach an accuracy.

    Reads only, so a run is not disturbed.
    """
    levels = _levels(reach or ())
    from qwen3_distill.report.cost_reach import INTERPOLATION, reached, read_run_cost

    found = [read_run_cost(folder, at_second=second) for folder in runs]
    crossings = [[reached(run, level, absolute=absolute) for level in levels] for run in found]
    if as_json:
        print_json(
            {
                "interpolation": INTERPOLATION,
                "levels_are": "accuracies" if absolute else "shares of the gap to the teacher",
                "runs": [
                    _record(folder, run, crossed)
                    for folder, run, crossed in zip(runs, found, crossings, strict=True)
                ],
            }
        )
        return
    _print(found, crossings, levels, absolute=absolute)
    if levels:
        say(INTERPOLATION)


def _record(folder: Path, run: "RunCost", crossed: "Sequence[Reached]") -> dict[str, Any]:
    return {
        "run": str(folder),
        "cost": None if run.totals is None else run.totals.record(),
        "teacher_accuracy": run.teacher,
        "evaluations": [
            {
                "step": item.step,
                "accuracy": item.accuracy,
                "marginal": dict(item.marginal),
                "total": dict(item.total),
            }
            for item in run.evaluated
        ],
        "reach": [item.record() for item in crossed],
    }


def _print(
    found: "Sequence[RunCost]",
    crossings: "Sequence[Sequence[Reached]]",
    levels: Sequence[float],
    *,
    absolute: bool,
) -> None:
    from qwen3_distill.report.cost_table import NO_LEDGER, cost_rows, reach_text

    for run in found:
        if run.totals is None:
            warn(f"{run.name}: {NO_LEDGER}")
        else:
            for model, why in run.totals.unknown.items():
                warn(f"{run.name}: FLOPs of the {model} are not counted: {why}")
    known = [run for run in found if run.totals is not None]
    if not known:
        return
    table = Table(show_edge=False)
    table.add_column("")
    table.add_column("")
    for run in known:
        table.add_column(run.name, justify="right", overflow="fold")
    group = ""
    for row in cost_rows([run.totals for run in known]):
        table.add_row("" if row.group == group else row.group, row.name, *map(str, row.values))
        group = row.group
    what = "accuracy" if absolute else "of the gap"
    for index, level in enumerate(levels):
        cells = [
            reach_text(crossed[index])
            for run, crossed in zip(found, crossings, strict=True)
            if run.totals is not None
        ]
        table.add_row("" if index else "reached", f"{level:.0%} {what}", *cells)
    Console().print(table)
