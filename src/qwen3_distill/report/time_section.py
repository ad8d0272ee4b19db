"""The time of a run, from its metrics: per step, in total, and the idle share of each stage."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeAlias

from qwen3_distill.recording import text
from qwen3_distill.recording.fleet_rates import MEMBER
from qwen3_distill.recording.jsonl import OCCASIONAL_STAGES, STEP_STAGES
from qwen3_distill.report.charts import (
    Figure,
    Line,
    LineChart,
    StackedChart,
    draw_lines,
    draw_stack,
)
from qwen3_distill.report.drawing import Colour
from qwen3_distill.report.run_files import is_number

Steps: TypeAlias = Sequence[Mapping[str, Any]]
"""Lines of ``metrics.jsonl``."""

STAGE_COLOURS: dict[str, Colour] = {
    "generate": "c1",
    "score": "c2",
    "train": "c3",
    "publish": "c4",
    "evaluate": "c5",
    "checkpoint": "c6",
    "other": "c7",
}

_ALL = "all"
"""In ``idle/all_fraction``: the time in which no stage was at work."""
_OVERLAP = 1.02
"""Stages whose seconds add up to more than this times the step's seconds overlapped."""


def time_figure(steps: Steps) -> Figure | None:
    """Seconds of every step by stage: stacked, or as lines where stages overlap."""
    timed = [line for line in steps if any(_recorded([line], stage) for stage in STEP_STAGES)]
    if _overlaps(timed):
        lines = [
            Line(
                name=stage,
                points=[(line["step"], _seconds(line, stage)) for line in timed],
                colour=STAGE_COLOURS[stage],
            )
            for stage in STEP_STAGES
        ]
        whole = [(line["step"], line["time/step_s"]) for line in timed if "time/step_s" in line]
        return draw_lines(
            LineChart(
                title="Busy seconds per step",
                lines=[
                    *lines,
                    Line(name="the whole step", points=whole, colour="muted", dashed=True),
                ],
                y_format="seconds",
                wide=True,
                note="Stages work side by side: their times do not add up to the step's.",
            )
        )
    return draw_stack(
        StackedChart(
            title="Seconds per step",
            names=STEP_STAGES,
            colours=[STAGE_COLOURS[stage] for stage in STEP_STAGES],
            x=[line["step"] for line in timed],
            values=[[_seconds(line, stage) for line in timed] for stage in STEP_STAGES],
            note="Evaluations and checkpoints, which only some steps have, are in the totals.",
        )
    )


@dataclass(frozen=True)
class TimeRow:
    """A stage's total."""

    name: str
    colour: str
    time: str
    share: str
    percent: float | None
    """Its part of the total, 0 to 100, as the width of its bar; None where stages overlap."""


def time_table(steps: Steps, summary: Mapping[str, Any] | None) -> list[TimeRow]:
    """Totals by stage, from the summary or, while there is none, from the recorded steps."""
    spent: dict[str, float] = dict((summary or {}).get("wall_s") or _spent(steps))
    parts = {name: seconds for name, seconds in spent.items() if name != "total"}
    total = spent.get("total") or sum(parts.values())
    if not total:
        return []
    overlap = sum(parts.values()) > _OVERLAP * total
    return [
        TimeRow(
            name=name,
            colour=STAGE_COLOURS.get(name, "c7"),
            time=text.duration(seconds),
            share=text.percent(seconds / total),
            percent=None if overlap else round(100 * seconds / total, 2),
        )
        for name, seconds in parts.items()
    ] + [TimeRow("total", "", text.duration(total), "", None)]


def _spent(steps: Steps) -> dict[str, float]:
    """The summary's ``wall_s``, computed from the steps alone."""
    stages = [s for s in (*STEP_STAGES, *OCCASIONAL_STAGES) if _recorded(steps, s)]
    spent = {stage: sum(_seconds(line, stage) for line in steps) for stage in stages}
    if not _recorded(steps, "step"):
        return spent
    total = sum(_seconds(line, "step") for line in steps)
    return {**spent, "other": max(0.0, total - sum(spent.values())), "total": total}


@dataclass(frozen=True)
class IdleRow:
    """The share of the steps' time in which a stage was idle."""

    name: str
    colour: str
    whole: str
    """Over all steps together, each weighted by its length."""
    middle: str
    last: str


def idle_table(steps: Steps) -> list[IdleRow]:
    """A row per stage in the order of the data, then one for all stages; empty without figures.

    Engines of fleets are left out: `fleet_section` has them.
    """
    keys = dict.fromkeys(key for line in steps for key in line if key.startswith("idle/"))
    names = [key.removeprefix("idle/").removesuffix("_fraction") for key in keys]
    names = [name for name in names if not re.fullmatch(MEMBER, name)]  # they have their own table
    ordered = sorted(names, key=lambda name: name == _ALL)
    return [row for name in ordered if (row := _idle_row(steps, name)) is not None]


def _idle_row(steps: Steps, name: str) -> IdleRow | None:
    key = f"idle/{name}_fraction"
    known = [line for line in steps if is_number(line.get(key)) and line.get("time/step_s")]
    if not known:
        return None
    whole_s = sum(line["time/step_s"] for line in known)
    idle_s = sum(line["time/step_s"] * line[key] for line in known)
    return IdleRow(
        name="no stage at work" if name == _ALL else name,
        colour="" if name == _ALL else STAGE_COLOURS.get(name, "c7"),
        whole=text.percent(idle_s / whole_s),
        middle=text.percent(median(line[key] for line in known)),
        last=text.percent(known[-1][key]),
    )


def _overlaps(steps: Steps) -> bool:
    stages = (*STEP_STAGES, *OCCASIONAL_STAGES)
    known = [line for line in steps if is_number(line.get("time/step_s"))]
    busy_s = sum(_seconds(line, stage) for line in known for stage in stages)
    return busy_s > _OVERLAP * sum(line["time/step_s"] for line in known) if known else False


def _recorded(steps: Steps, stage: str) -> bool:
    return any(is_number(line.get(f"time/{stage}_s")) for line in steps)


def _seconds(line: Mapping[str, Any], stage: str) -> float:
    return line.get(f"time/{stage}_s") or 0.0
