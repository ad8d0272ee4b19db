"""``report.html``: what a run did, on one page that needs no network."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qwen3_distill import __version__
from qwen3_distill.errors import DataError, RunFolderError
from qwen3_distill.recording import text
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.report.charts import (
    Figure,
    Interval,
    Level,
    Line,
    LineChart,
    draw_intervals,
    draw_lines,
)
from qwen3_distill.report.drawing import Colour, Point
from qwen3_distill.report.rollout_view import (
    ROLLOUTS_PER_STEP,
    RolloutView,
    gap_legend,
    rollout_groups,
)
from qwen3_distill.report.time_section import STAGE_COLOURS, idle_table, time_figure, time_table
from qwen3_distill.report.timeline import Timeline, draw_timeline, load_timeline
from qwen3_distill.utils.files import atomic_path

__all__ = ["RolloutView", "write_report"]


def write_report(
    run_folder: Path | str, rollouts: Sequence[RolloutView], out: Path | str | None = None
) -> Path:
    """Write the page, of a finished run or of one that is still going on or was cut short.

    What a partial run does not have yet is named on the page. Of every step only the first few
    rollouts in the order given are shown, and of the steps the first, a middle and the last one.

    Args:
        run_folder: Reads ``config.json``, ``manifest.json``, ``metrics.jsonl``,
            ``evaluations.jsonl``, ``summary.json`` and traces where they exist.
        rollouts: Saved rollouts of the run, in any order of steps.
        out: File to write; default ``report.html`` in the run folder.

    Returns:
        The file written.

    Raises:
        RunFolderError: there is no such folder, or ``out`` cannot be written.
        DataError: a file of the run folder is malformed.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is not a run folder: no such directory")
    target = folder / "report.html" if out is None else Path(out)
    page = _render(_Run.load(folder), rollouts)
    with atomic_path(target) as temporary:
        # A config may hold half of a surrogate pair, which UTF-8 has no form for.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    return target


# --- The run folder -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The files of a run folder; empty or None where there is no such file."""

    name: str
    config: Mapping[str, Any] | None
    manifest: Mapping[str, Any] | None
    summary: Mapping[str, Any] | None
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    timeline: Timeline | None

    @classmethod
    def load(cls, folder: Path) -> "_Run":
        return cls(
            name=folder.resolve().name,
            config=_json_if_there(folder / "config.json"),
            manifest=_json_if_there(folder / "manifest.json"),
            summary=_json_if_there(folder / "summary.json"),
            steps=_jsonl_if_there(folder / "metrics.jsonl"),
            evaluations=_jsonl_if_there(folder / "evaluations.jsonl"),
            timeline=load_timeline(folder),
        )

    def points(self, key: str) -> list[Point]:
        """(step, value) wherever ``key`` has a value."""
        return [(line["step"], line[key]) for line in self.steps if _is_number(line.get(key))]

    def values(self, key: str) -> list[float]:
        return [y for _, y in self.points(key)]

    def setting(self, *path: str) -> Any:
        """A value of the config; None where it is not there."""
        value: Any = self.config
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    @property
    def last_step(self) -> int | None:
        return self.steps[-1]["step"] if self.steps else None


def _json_if_there(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object")
    return content


def _jsonl_if_there(path: Path) -> list[dict[str, Any]]:
    try:
        return read_jsonl(path)
    except FileNotFoundError:
        return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# --- The page -----------------------------------------------------------------------------------


def _render(run: _Run, rollouts: Sequence[RolloutView]) -> str:
    package = resources.files("qwen3_distill.report")
    source = package.joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        version=__version__,
        title=run.name,
        subtitle=_subtitle(run),
        status=_status(run),
        result=_result(run),
        tiles=_tiles(run),
        learning=_learning_figures(run),
        responses=_response_figures(run),
        time_figure=time_figure(run.steps),
        time_table=time_table(run.steps, run.summary),
        timeline=draw_timeline(run.timeline, STAGE_COLOURS) if run.timeline else None,
        idle_table=idle_table(run.steps),
        health=_health_figures(run),
        health_table=_health_table(run),
        legend=gap_legend(),
        rollout_groups=rollout_groups(rollouts),
        rollouts_per_step=ROLLOUTS_PER_STEP,
        config=_pretty(run.config),
        manifest=_flat(run.manifest),
        has_steps=bool(run.steps),
        has_accuracy=bool(_student_evaluations(run)),
        finished=run.summary is not None,
    )


@dataclass(frozen=True)
class _Status:
    kind: Literal["done", "partial"]
    text: str


def _status(run: _Run) -> _Status:
    if run.summary is not None:
        return _Status("done", f"finished, {run.summary.get('steps', run.last_step):,} steps")
    if run.last_step is None:
        return _Status("partial", "not finished: no step was recorded")
    total = run.setting("steps")
    of = f" of {total:,}" if isinstance(total, int) else ""
    return _Status("partial", f"not finished: {run.last_step:,}{of} steps recorded")


def _subtitle(run: _Run) -> list[tuple[str, str]]:
    student, teacher = run.setting("student", "model"), run.setting("scoring", "model")
    pairs = (
        ("student", Path(student).name if isinstance(student, str) else None),
        ("teacher", Path(teacher).name if isinstance(teacher, str) else None),
        ("objective", run.setting("objective", "kind")),
        ("tuning", run.setting("training", "tuning", "kind")),
        ("pipeline", run.setting("pipeline", "kind")),
        ("seed", run.setting("seed")),
    )
    return [(name, str(value)) for name, value in pairs if value is not None]


@dataclass(frozen=True)
class _Row:
    """A line of the result table; None where nothing was measured."""

    name: str
    accuracy: str | None
    interval: str = ""
    problems: str = ""
    tokens: str = ""
    truncated: str = ""


@dataclass(frozen=True)
class _Result:
    rows: Sequence[_Row]
    chart: Markup | None
    sentence: str


_WHO: tuple[tuple[str, str, Colour], ...] = (
    ("before", "student before", "muted"),
    ("after", "student after", "c1"),
    ("teacher", "teacher", "c2"),
)


def _result(run: _Run) -> _Result:
    measured = {who: _measured(run, who) for who, _, _ in _WHO}
    names = {who: name for who, name, _ in _WHO}
    if run.summary is None and (latest := measured["after"]) is not None:
        names["after"] = f"student at step {latest['step']:,}"
    rows = [_result_row(names[who], measured[who]) for who, _, _ in _WHO]
    intervals = [
        Interval(names[who], record["accuracy"], record["ci_low"], record["ci_high"], colour)
        for who, _, colour in _WHO
        if (record := measured[who]) is not None
    ]
    return _Result(
        rows=rows,
        chart=draw_intervals(intervals) if intervals else None,
        sentence=_result_sentence(measured),
    )


def _measured(run: _Run, who: str) -> Mapping[str, Any] | None:
    """The evaluation behind a line of the table, in the form of ``evaluations.jsonl``.

    The summary has the last word on the numbers; the log knows the rest, and all of it while
    the run is not finished.
    """
    record = _logged_evaluation(run, who)
    if run.summary is None:
        return record
    final = (run.summary.get("accuracy") or {}).get(who)
    if not final:
        return None
    numbers = {"accuracy": final["value"], "ci_low": final["ci_low"], "ci_high": final["ci_high"]}
    same = record is not None and abs(record["accuracy"] - final["value"]) < 1e-9
    return {**(record if record is not None and same else {}), **numbers}


def _logged_evaluation(run: _Run, who: str) -> Mapping[str, Any] | None:
    if who == "teacher":
        return next((e for e in run.evaluations if e["model"] == "teacher"), None)
    student = _student_evaluations(run)
    if who == "before":
        return student[0] if student and student[0]["step"] == 0 else None
    return student[-1] if student and student[-1]["step"] > 0 else None


def _student_evaluations(run: _Run) -> list[Mapping[str, Any]]:
    """The student's evaluations by step; of several at one step, the one of most problems."""
    by_step: dict[int, Mapping[str, Any]] = {}
    for record in run.evaluations:
        if record["model"] == "student":
            earlier = by_step.get(record["step"])
            if earlier is None or record["num_problems"] >= earlier["num_problems"]:
                by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def _result_row(name: str, record: Mapping[str, Any] | None) -> _Row:
    if record is None:
        return _Row(name, None)
    samples = record.get("samples_per_problem", 1)
    problems = f"{record['num_problems']:,}" if "num_problems" in record else ""
    return _Row(
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


def _tiles(run: _Run) -> list[tuple[str, str]]:
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
    tiles = [("optimizer steps", f"{steps:,}")] if steps is not None else []
    tiles += [(f"tokens {name}", text.quantity(count)) for name, count in tokens.items()]
    if total_s is not None:
        tiles.append(("wall time", text.duration(total_s)))
    return tiles


# --- Figures ------------------------------------------------------------------------------------


def _drawn(charts: Iterable[LineChart]) -> list[Figure]:
    return [figure for chart in charts if (figure := draw_lines(chart)) is not None]


def _metric_line(run: _Run, key: str, name: str, colour: Colour = "c1") -> Line:
    points = run.points(key)
    window = min(25, 2 * round(len(points) / 30) + 1)
    return Line(name=name, points=points, colour=colour, smooth=window)


def _maximum_line(run: _Run, key: str, name: str, colour: Colour) -> Line:
    """For what must not hide in a mean."""
    return Line(name=name, points=run.points(key), colour=colour, reduce="max")


def _learning_figures(run: _Run) -> list[Figure]:
    kl = LineChart(
        title="Reverse KL",
        lines=[_metric_line(run, "loss/reverse_kl_nats", "KL(student ‖ teacher), nats per token")],
        note="Estimated on the sampled tokens, so single steps may lie below zero.",
    )
    entropy = LineChart(
        title="Student entropy",
        lines=[_metric_line(run, "loss/entropy_nats", "nats per token", "c3")],
        note="A fall toward zero means that the student answers ever more alike.",
    )
    solved = LineChart(
        title="Training rollouts solved",
        lines=[_metric_line(run, "rollout/accuracy", "share of rollouts", "c4")],
        y_format="percent",
        y_ceiling=1.0,
        note="On training prompts, as sampled; the held-out accuracy is the measure.",
    )
    advantage = LineChart(
        title="Size of the advantage",
        lines=[_metric_line(run, "loss/advantage_abs_nats", "mean |A|, nats", "c5")],
        note="How much the teacher has to say about a token, on average.",
    )
    return _drawn([_accuracy_chart(run), kl, entropy, solved, advantage])


def _accuracy_chart(run: _Run) -> LineChart:
    student = _student_evaluations(run)
    teacher = _logged_evaluation(run, "teacher")
    measured = Line(
        name="student, 95% interval",
        points=[(e["step"], e["accuracy"]) for e in student],
        band=[(e["step"], e["ci_low"], e["ci_high"]) for e in student],
        markers=True,
    )
    levels = []
    if teacher is not None:
        low, high = teacher["ci_low"], teacher["ci_high"]
        name = "teacher, 95% interval"
        levels = [Level(name=name, value=teacher["accuracy"], colour="c2", low=low, high=high)]
    counts = sorted({e["num_problems"] for e in student})
    problems = " to ".join(f"{count:,}" for count in dict.fromkeys([*counts[:1], *counts[-1:]]))
    return LineChart(
        title="Held-out accuracy",
        lines=[measured],
        levels=levels,
        y_format="percent",
        y_floor=None,
        y_ceiling=1.0,
        wide=True,
        note=f"Over {problems} problems." if problems else "",
    )


def _response_figures(run: _Run) -> list[Figure]:
    return _drawn(
        [
            LineChart(
                title="Response length",
                lines=[_metric_line(run, "rollout/response_tokens", "mean tokens")],
            ),
            LineChart(
                title="Truncated responses",
                lines=[_metric_line(run, "rollout/truncated_fraction", "share of rollouts", "c6")],
                y_format="percent",
                y_ceiling=1.0,
                note="Cut at the token limit before the student ended its answer.",
            ),
        ]
    )


def _health_figures(run: _Run) -> list[Figure]:
    engine = LineChart(
        title="Learner against engine",
        lines=[_metric_line(run, "health/learner_vs_engine_abs_nats", "mean |gap|, nats", "c4")],
        note="Log-probabilities of the same tokens under the same weights: rounding, if all is "
        "well.",
    )
    ratio = LineChart(
        title="Largest importance ratio",
        lines=[_maximum_line(run, "health/ratio_max", "maximum over tokens", "c5")],
        y_floor=None,
        note="Learner over sampler, before the cap. Near 1 while sampling is on-policy.",
    )
    gradient = LineChart(
        title="Gradient norm", lines=[_metric_line(run, "optim/grad_norm", "before clipping", "c6")]
    )
    lag = LineChart(
        title="Weight lag",
        lines=[_maximum_line(run, "weights/lag_steps", "steps", "c7")],
        note="Age of the oldest token that a step trained on.",
    )
    return _drawn([engine, ratio, gradient, lag])


_HEALTH_ROWS = (
    ("health/learner_vs_engine_abs_nats", "learner against engine, nats"),
    ("health/ratio_max", "largest importance ratio"),
    ("health/ratio_capped_fraction", "tokens with a capped ratio"),
    ("health/advantage_clipped_fraction", "tokens with a clipped advantage"),
    ("loss/advantage_abs_nats", "mean size of the advantage, nats"),
    ("optim/grad_norm", "gradient norm"),
    ("weights/lag_steps", "weight lag, steps"),
)


def _health_table(run: _Run) -> list[tuple[str, str, str, str]]:
    """(name, median, maximum, last) of every health number that the run recorded."""
    rows = []
    for key, name in _HEALTH_ROWS:
        if values := run.values(key):
            show = text.percent if key.endswith("_fraction") else text.number
            rows.append((name, show(median(values)), show(max(values)), show(values[-1])))
    return rows


# --- Config and manifest ------------------------------------------------------------------------


def _pretty(content: Mapping[str, Any] | None) -> str | None:
    return None if content is None else json.dumps(content, indent=2, ensure_ascii=False)


def _flat(content: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Leaves of nested JSON with their dotted paths."""
    if content is None and not prefix:
        return []
    if isinstance(content, Mapping) and content:
        return [
            leaf
            for key, value in content.items()
            for leaf in _flat(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, content if isinstance(content, str) else json.dumps(content))]
