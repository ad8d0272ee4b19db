"""Charts over optimizer steps, as inline SVG.

Drawn here rather than by a plotting library: the text stays text, a whole report stays small, and
the page's script reads the data for its crosshair from the ``data-chart`` attribute.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from markupsafe import Markup

from qwen3_distill.recording.text import percent
from qwen3_distill.report.drawing import (
    FORMATS,
    Colour,
    Drawing,
    Format,
    Point,
    round_step,
    tick_label,
    ticks,
)

MAX_POINTS = 500
"""Longer series are averaged (or maximised) in buckets: no screen shows more."""
_NAME_CHARACTER = 6.2
"""Width of a character of a row's name; the widest names seen have 5.7."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 14.0, 12.0, 34.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """One quantity over steps, with its interval if ``band`` is given.

    With ``smooth`` > 1 the line is a running mean over that many points, the values faintly behind.
    """

    name: str
    points: Sequence[Point]
    colour: Colour = "c1"
    band: Sequence[tuple[float, float, float]] = ()
    """(x, low, high), same x as ``points``."""
    markers: bool = False
    smooth: int = 1
    reduce: Literal["mean", "max"] = "mean"
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line with an optional interval."""

    name: str
    value: float
    colour: Colour
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Lines over optimizer steps."""

    title: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    y_format: Format = "number"
    y_floor: float | None = 0.0
    """The axis starts at this value or lower; None: near the lowest value."""
    y_ceiling: float | None = None
    """The axis ends at this value or lower."""
    wide: bool = False
    note: str = ""
    x_name: str = "step"
    x_text: Callable[[float], str] = "{:,.0f}".format


@dataclass(frozen=True, kw_only=True)
class StackedChart:
    """Quantities that add up, over optimizer steps."""

    title: str
    names: Sequence[str]
    colours: Sequence[Colour]
    x: Sequence[float]
    values: Sequence[Sequence[float]]
    """One sequence per name, each as long as ``x``."""
    y_format: Format = "seconds"
    wide: bool = True
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawn chart with its title, legend and note."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...]
    """(colour class, name)."""
    wide: bool
    note: str


@dataclass(frozen=True)
class Interval:
    """A value with its interval, as fractions of 1."""

    name: str
    value: float
    low: float
    high: float
    colour: Colour


class _Canvas(Drawing):
    """The plot area: maps data to pixels."""

    def __init__(self, width: float, height: float, x_range: Point, y_range: Point) -> None:
        super().__init__(width)
        self.height = height
        self.x_range = _widened(x_range)
        self.y_range = _widened(y_range)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        share = (min(max(value, low), high) - low) / (high - low)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)

    def curve(self, css: str, points: Sequence[Point]) -> None:
        self.path(css, [(self.x(x), self.y(y)) for x, y in points])

    def area(self, css: str, low: Sequence[Point], high: Sequence[Point]) -> None:
        outline = [*high, *reversed(low)]
        self.path(css, [(self.x(x), self.y(y)) for x, y in outline], closed=True)

    def axes(
        self,
        y_format: Format,
        x_name: str = "step",
        x_text: Callable[[float], str] = "{:,.0f}".format,
    ) -> None:
        marks = ticks(*self.y_range, 5)
        spacing = marks[1] - marks[0] if len(marks) > 1 else 1.0
        for tick in marks:
            y = self.y(tick)
            self.line("grid", _LEFT, self.width - _RIGHT, y, y)
            self.text("tick", _LEFT - 8, y + 4, tick_label(tick, spacing, y_format), "end")
        for tick in ticks(*self.x_range, 8 if self.width > 600 else 5, whole=True):
            self.text("tick", self.x(tick), self.height - _BOTTOM + 17, x_text(tick), "middle")
        self.text("tick axis", self.width - _RIGHT, self.height - 3, x_name, "end")

    def chart(self, title: str, hover: object) -> Markup:
        """Return the whole SVG, with the crosshair that the page's script moves."""
        template = '<line class="cross" y1="{top}" y2="{bottom}"/>'
        self.add(template, top=_TOP, bottom=self.height - _BOTTOM)
        return self.svg(self.height, title, hover)


def draw_lines(chart: LineChart) -> Figure | None:
    """Draw the chart; None if there is no point to draw."""
    lines = [_thinned(line) for line in chart.lines if line.points]
    if not lines:
        return None
    xs = [x for line in lines for x, _ in line.points]
    canvas = _canvas(chart.wide, (min(xs), max(xs)), _y_range(chart, lines))
    canvas.axes(chart.y_format, chart.x_name, chart.x_text)
    for level in chart.levels:
        _draw_level(canvas, level)
    for line in lines:
        _draw_line(canvas, line)
    named = [(n.colour, n.name, _line_labels(n, chart.y_format)) for n in lines]
    hover = _hover(canvas, named, lambda x: f"{chart.x_name} {chart.x_text(x)}")
    return Figure(
        title=chart.title,
        svg=canvas.chart(chart.title, hover),
        legend=(
            *((_css(line), line.name) for line in lines),
            *((f"{level.colour} dash", level.name) for level in chart.levels),
        ),
        wide=chart.wide,
        note=_note(chart.note, chart.lines),
    )


def draw_stack(chart: StackedChart) -> Figure | None:
    """Draw the chart; None if there are no points."""
    if not chart.x:
        return None
    series = [_bucketed(list(zip(chart.x, values, strict=True)), "mean") for values in chart.values]
    xs = [x for x, _ in series[0]]
    sums = [0.0] * len(xs)
    layers: list[tuple[list[Point], list[Point]]] = []
    for points in series:
        low = list(zip(xs, sums, strict=True))
        sums = [base + y for base, (_, y) in zip(sums, points, strict=True)]
        layers.append((low, list(zip(xs, sums, strict=True))))
    canvas = _canvas(chart.wide, (xs[0], xs[-1]), (0.0, _nice_top(0.0, max(sums))))
    canvas.axes(chart.y_format)
    for (low, high), colour in zip(layers, chart.colours, strict=True):
        canvas.area(f"stack {colour}", low, high)
    show = FORMATS[chart.y_format]
    named = [
        (colour, name, [(x, show(y)) for x, y in points])
        for colour, name, points in zip(chart.colours, chart.names, series, strict=True)
    ]
    return Figure(
        title=chart.title,
        svg=canvas.chart(chart.title, _hover(canvas, named)),
        legend=tuple(zip(chart.colours, chart.names, strict=True)),
        wide=chart.wide,
        note=chart.note + (_bucket_note("means") if len(chart.x) > MAX_POINTS else ""),
    )


def draw_intervals(rows: Sequence[Interval]) -> Markup:
    """Draw one row per value: a dot with its interval, on a common axis."""
    width, row, right = 720.0, 40.0, 70.0
    left = max(128.0, 26 + _NAME_CHARACTER * max(len(item.name) for item in rows))
    height = row * len(rows) + 30
    low, high = _interval_axis(rows)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    drawing = Drawing(width)
    for tick in ticks(low, high, 6):
        drawing.line("grid", x(tick), x(tick), 4, height - 26)
        drawing.text("tick", x(tick), height - 8, f"{tick:.0%}", "middle")
    for index, item in enumerate(rows):
        middle, baseline = row * index + 24, row * index + 29
        drawing.text("name", left - 18, baseline, item.name, "end")
        drawing.line(f"whisker {item.colour}", x(item.low), x(item.high), middle, middle)
        drawing.dot(f"dot {item.colour}", x(item.value), middle, 6)
        drawing.text("value", x(item.high) + 10, baseline, percent(item.value))
    return drawing.svg(height, "accuracy")


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Mean of ``window`` points around each point; of fewer at the ends."""
    half = window // 2
    smoothed: list[Point] = []
    for index, (x, _) in enumerate(points):
        part = [y for _, y in points[max(0, index - half) : index + half + 1]]
        smoothed.append((x, sum(part) / len(part)))
    return smoothed


def _canvas(wide: bool, x_range: Point, y_range: Point) -> _Canvas:
    if x_range[0] == x_range[1]:
        x_range = (x_range[0] - 1, x_range[1] + 1)
    width, height = (940.0, 300.0) if wide else (460.0, 236.0)
    return _Canvas(width=width, height=height, x_range=x_range, y_range=y_range)


def _y_range(chart: LineChart, lines: Sequence[Line]) -> Point:
    ys = [y for line in lines for _, y in line.points]
    ys += [edge for line in lines for _, low, high in line.band for edge in (low, high)]
    for level in chart.levels:
        ys += [edge for edge in (level.value, level.low, level.high) if edge is not None]
    low, high = min(ys), max(ys)
    if chart.y_floor is not None:
        low = min(low, chart.y_floor)
    if low < 0:
        low = -_nice_top(0.0, -low)
    elif chart.y_floor is None:
        margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
        low = max(0.0, math.floor((low - margin) / round_step(margin)) * round_step(margin))
    top = _nice_top(low, high)
    return (low, min(top, chart.y_ceiling) if chart.y_ceiling is not None else top)


def _widened(ends: Point) -> Point:
    """Return a range of a length above zero, also where its ends are one number."""
    low, high = ends
    return ends if high > low else (low, low + max(1.0, 0.1 * abs(low)))


def _nice_top(low: float, high: float) -> float:
    if high <= low:
        return low + 1.0
    step = round_step((high - low) / 5)
    return low + math.ceil((high - low) / step - 1e-9) * step


def _draw_level(canvas: _Canvas, level: Level) -> None:
    ends = canvas.x_range
    if level.low is not None and level.high is not None:
        low = [(x, level.low) for x in ends]
        canvas.area(f"band {level.colour}", low, [(x, level.high) for x in ends])
    canvas.curve(f"line dash {level.colour}", [(x, level.value) for x in ends])


def _draw_line(canvas: _Canvas, line: Line) -> None:
    if line.band:
        low = [(x, y) for x, y, _ in line.band]
        canvas.area(f"band {line.colour}", low, [(x, y) for x, _, y in line.band])
    if line.smooth > 1:
        canvas.curve(f"raw {line.colour}", line.points)
        canvas.curve(f"line {line.colour}", running_mean(line.points, line.smooth))
    else:
        canvas.curve(f"line {_css(line)}", line.points)
    if line.markers or len(line.points) == 1:
        for x, y in line.points:
            canvas.dot(f"dot {line.colour}", canvas.x(x), canvas.y(y), 4)


def _css(line: Line) -> str:
    return f"{line.colour} dash" if line.dashed else line.colour


def _thinned(line: Line) -> Line:
    if line.band:  # measured points with intervals: few, and their mean would mean nothing
        return line
    return replace(line, points=_bucketed(line.points, line.reduce))


def _bucketed(points: Sequence[Point], reduce: Literal["mean", "max"]) -> Sequence[Point]:
    if len(points) <= MAX_POINTS:
        return points
    edges = [round(index * len(points) / MAX_POINTS) for index in range(MAX_POINTS + 1)]
    buckets: list[Point] = []
    for start, stop in itertools.pairwise(edges):
        part = [y for _, y in points[start:stop]]
        value = max(part) if reduce == "max" else sum(part) / len(part)
        buckets.append((points[stop - 1][0], value))
    return buckets


def _note(note: str, lines: Sequence[Line]) -> str:
    smooth = max((line.smooth for line in lines), default=1)
    longest = max(lines, key=lambda line: len(line.points))
    grouped = len(longest.points) > MAX_POINTS
    if smooth > 1:
        one, many = ("group", "groups") if grouped else ("step", "steps")
        note += f" Thin: each {one}; thick: running mean over {smooth} {many}."
    if grouped:
        note += _bucket_note("maxima" if longest.reduce == "max" else "means")
    return note.strip()


def _bucket_note(kind: str) -> str:
    return f" Drawn as {kind} of {MAX_POINTS} equal groups of steps."


def _line_labels(line: Line, y_format: Format) -> list[tuple[float, str]]:
    show = FORMATS[y_format]
    if not line.band:
        return [(x, show(y)) for x, y in line.points]
    return [
        (x, f"{show(y)} ({show(low)} to {show(high)})")
        for (x, y), (_, low, high) in zip(line.points, line.band, strict=True)
    ]


def _hover(
    canvas: _Canvas,
    series: Sequence[tuple[str, str, Sequence[tuple[float, str]]]],
    x_label: Callable[[float], str] = "step {:,.0f}".format,
) -> object:
    """Data for the page's crosshair: pixel columns and the text at each."""
    columns: dict[float, list[tuple[str, str, str]]] = {}
    for colour, name, labels in series:
        for x, label in labels:
            columns.setdefault(x, []).append((colour, name, label))
    ordered = sorted(columns)
    return {
        "px": [round(canvas.x(x), 1) for x in ordered],
        "at": [[x_label(x), columns[x]] for x in ordered],
    }


def _interval_axis(rows: Sequence[Interval]) -> Point:
    low, high = min(row.low for row in rows), max(row.high for row in rows)
    margin = max(0.05, 0.15 * (high - low))
    return (
        max(0.0, math.floor((low - margin) * 20) / 20),
        min(1.0, math.ceil((high + margin / 2) * 20) / 20),
    )
