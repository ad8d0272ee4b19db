"""The result of a run: accuracy before and after with its chart and sentence, and the tiles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from qwen3_distill.recording import text
from qwen3_distill.report.charts import (
    Interval,
    draw_intervals,
)
from qwen3_distill.report.drawing import Colour
from qwen3_distill.report.run_files import RunFiles


@dataclass(frozen=True)
class ResultRow:
    """A row of the result table; ``accuracy`` is None where nothing was measured."""

    name: str
    accuracy: str | None
    interval: str = ""
    problems: str = ""
    tokens: str = ""
    truncated: str = ""


@dataclass(frozen=True)
class Result:
    """The table, its chart and the sentence above it."""

    rows: Sequence[ResultRow]
    chart: Markup | None
    sentence: str


_WHO: tuple[tuple[str, str, Colour], ...] = (
    ("before", "student before", "muted"),
    ("after", "student after", "c1"),
    ("teacher", "teacher", "c2"),
)


def result_section(run: RunFiles) -> Result:
    """The accuracy of the student before and after training, and of the teacher."""
    measured = {who: _measured(run, who) for who, _, _ in _WHO}
    names = {who: name for who, name, _ in _WHO}
    if run.summary is None and (latest := measured["after"]) is not None:
        names["after"] = f"student at step {latest['step']:,}"
    second = {who: run.evaluation(who, at_second=True) for who, _, _ in _WHO}
    at = next((f", {text.temperature_text(r['temperature'])}" for r in second.values() if r), "")
    rows = [_result_row(names[who], measured[who]) for who, _, _ in _WHO]
    rows += [_result_row(names[who] + at, record) for who, record in second.items() if record]
    intervals = [
        Interval(name, record["accuracy"], record["ci_low"], record["ci_high"], colour)
        for who, _, colour in _WHO
        for name, record in ((names[who], measured[who]), (names[who] + at, second[who]))
        if record is not None
    ]
    return Result(
        rows=rows,
        chart=draw_intervals(intervals) if intervals else None,
        sentence=_result_sentence(measured) + _second_sentence(measured, second, at),
    )


def _second_sentence(
    measured: Mapping[str, Mapping[str, Any] | None],
    second: Mapping[str, Mapping[str, Any] | None],
    at: str,
) -> str:
    """State the change at the second temperature, where a student that only sharpened has none."""
    before, after = second["before"], second["after"]
    if before is None or after is None:
        return ""
    change = after["accuracy"] - before["accuracy"]
    verb = "rose" if change >= 0 else "fell"
    where = "With greedy answers" if at == ", greedy" else f"At{at.removeprefix(',')}"
    sentence = f" {where} it {verb} by "
    sentence += f"{100 * abs(change):.1f} points."
    first_before, first_after = measured["before"], measured["after"]
    gained = first_before and first_after and first_after["ci_low"] > first_before["ci_high"]
    if gained and after["ci_low"] <= before["ci_high"]:
        sentence += (
            " There the intervals overlap: the student may have sharpened what it could do before,"
            " and not learned more."
        )
    return sentence


def _measured(run: RunFiles, who: str) -> Mapping[str, Any] | None:
    """The evaluation behind a row of the table, in the form of ``evaluations.jsonl``.

    Accuracy and interval come from the summary, the rest from the log; while the run is not
    finished, all of it comes from the log.
    """
    record = run.evaluation(who)
    if run.summary is None:
        return record
    final = (run.summary.get("accuracy") or {}).get(who)
    if not final:
        return None
    numbers = {"accuracy": final["value"], "ci_low": final["ci_low"], "ci_high": final["ci_high"]}
    same = record is not None and abs(record["accuracy"] - final["value"]) < 1e-9
    return {**(record if record is not None and same else {}), **numbers}


def _result_row(name: str, record: Mapping[str, Any] | None) -> ResultRow:
    if record is None:
        return ResultRow(name, None)
    samples = record.get("samples_per_problem", 1)
    problems = f"{record['num_problems']:,}" if "num_problems" in record else ""
    return ResultRow(
        name=name,
        accuracy=text.percent(record["accuracy"]),
        interval=f"{text.points(record['ci_low'])} to {text.percent(record['ci_high'])}",
        problems=problems + (f" x {samples}" if problems and samples != 1 else ""),
        tokens=f"{record['mean_tokens']:,.1f}" if "mean_tokens" in record else "",
        truncated=text.percent(record["truncated_fraction"])
        if "truncated_fraction" in record
        else "",
    )


def _result_sentence(measured: Mapping[str, Mapping[str, Any] | None]) -> str:
    before, after, teacher = (measured[who] for who in ("before", "after", "teacher"))
    if before is None or after is None:
        return ""
    change = after["accuracy"] - before["accuracy"]
    verb = "rose" if change >= 0 else "fell"
    sentence = f"The student's accuracy {verb} by {100 * abs(change):.1f} points"
    if change > 0 and teacher is not None and teacher["ci_low"] > before["ci_high"]:
        closed = change / (teacher["accuracy"] - before["accuracy"])
        sentence += f", {closed:.0%} of its distance to the teacher"
    if after["ci_low"] <= before["ci_high"] and before["ci_low"] <= after["ci_high"]:
        sentence += "; the two intervals overlap, so this may be chance"
    return sentence + "."


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """(name, value) of the run's size: steps, tokens and wall time."""
    summary = run.summary or {}
    tokens = summary.get("tokens") or {
        name: sum(values)
        for name in ("generated", "trained")
        if (values := run.values(f"tokens/{name}"))
    }
    total_s = (summary.get("wall_s") or {}).get("total")
    if total_s is None and run.values("wall_s"):
        total_s = run.values("wall_s")[-1]
    steps = summary.get("steps", run.last_step)
    found = [("optimizer steps", f"{steps:,}")] if steps is not None else []
    found += [(f"tokens {name}", text.quantity(count)) for name, count in tokens.items()]
    if total_s is not None:
        found.append(("wall time", text.duration(total_s)))
    return found
