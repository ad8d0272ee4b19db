"""The cost section of the report: a table, and accuracy against cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from qwen3_distill.report.charts import Figure, Level, Line, LineChart, draw_lines
from qwen3_distill.report.cost_reach import INTERPOLATION, reached, run_cost
from qwen3_distill.report.cost_table import CostRow, cost_rows, reach_text, si
from qwen3_distill.report.run_files import RunFiles

_LEVELS = (0.5, 0.8, 0.95)


@dataclass(frozen=True)
class CostSection:
    """Table, chart and the costs at which shares of the gap to the teacher were reached."""

    groups: Sequence[tuple[str, Sequence[CostRow]]]
    figure: Figure | None
    levels: Sequence[tuple[str, str]]
    notes: Sequence[str]


def cost_section(run: RunFiles) -> CostSection | None:
    """Build the section; None for a run without a cost ledger."""
    if run.cost is None:
        return None
    rows = cost_rows([run.cost])
    names = list(dict.fromkeys(row.group for row in rows))
    cost = run_cost(run)
    levels = []
    if cost.teacher is not None and cost.evaluated:
        levels = [
            (f"{level:.0%} of the gap to the teacher", reach_text(found))
            for level in _LEVELS
            for found in [reached(cost, level, absolute=False)]
        ]
    notes = [
        f"FLOPs of the {model} are not counted: {why}" for model, why in run.cost.unknown.items()
    ]
    return CostSection(
        groups=[(name, [row for row in rows if row.group == name]) for name in names],
        figure=_figure(run),
        levels=levels,
        notes=[*notes, INTERPOLATION] if levels else notes,
    )


def _figure(run: RunFiles) -> Figure | None:
    """Draw the student's accuracy over marginal FLOPs; None without two evaluations."""
    cost = run_cost(run)
    points = [(item.marginal["flops"], item.accuracy) for item in cost.evaluated]
    if len(points) < 2 or not points[-1][0]:
        return None
    levels = [Level(name="teacher", value=cost.teacher, colour="c2")] if cost.teacher else []
    return draw_lines(
        LineChart(
            title="Held-out accuracy against cost",
            lines=[Line(name="student", points=points, markers=True)],
            levels=levels,
            y_format="percent",
            y_floor=None,
            y_ceiling=1.0,
            wide=True,
            x_name="FLOP",
            x_text=si,
            note="Cost of the kept steps: sampling, scoring and training, by the models' shapes.",
        )
    )
