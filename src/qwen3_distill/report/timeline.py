"""Draws the last steps of a trace: the spans of every stage, queues, and weight versions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from qwen3_distill.errors import DataError
from qwen3_distill.recording.text import duration, number
from qwen3_distill.recording.trace import (
    STEPS,
    TRACE_FILE,
    WEIGHTS,
    Event,
    read_trace,
    set_aside,
)
from qwen3_distill.recording.trace_events import check_events
from qwen3_distill.report.charts import Figure
from qwen3_distill.report.drawing import Colour, Drawing, Point, tick_label, ticks

STEPS_SHOWN = 4
MAX_ROWS = 8
"""A stage with more spans open at once is drawn as their number over time."""

_WIDTH, _LEFT, _RIGHT, _TOP, _AXIS = 940.0, 152.0, 14.0, 24.0, 26.0
_BAR_HEIGHT, _SPLIT_HEIGHT, _QUEUE_HEIGHT, _GAP = 20.0, 9.0, 34.0, 9.0
_SMALLEST_WIDTH = 1.0
_SEPARABLE_WIDTH, _SEAM = 3.0, 0.75
"""Pixels: bars of at least this width are drawn apart, with a seam between them."""
_LABEL_WIDTH, _LABEL_LENGTH = 34.0, 21


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stage at work, in seconds of the trace."""

    row: int
    name: str
    began_s: float
    ended_s: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The events between two moments of a trace."""

    began_s: float
    ended_s: float
    steps: Sequence[tuple[int, float, float]]
    """(step, begin, end)."""
    spans: Mapping[str, Sequence[Span]]
    """By stage, in the trace's order of stages."""
    instants: Mapping[str, Sequence[tuple[str, float]]]
    """By track: (name, moment)."""
    counters: Mapping[str, Sequence[Point]]
    """By counter: (begin, value); the first value begins at or before the window."""


def load_timeline(
    run_folder: Path,
    num_steps: int = STEPS_SHOWN,
    note: Callable[[str], object] = lambda line: None,
) -> Timeline | None:
    """Return the last steps of the newest trace that has any; None without one.

    Args:
        note: told of each trace that is left out because of its form.
    """
    newest = run_folder / TRACE_FILE
    for path in (newest, *set_aside(newest)):
        if not path.exists():
            continue
        try:
            events = read_trace(path)
            check_events(events, path.name)
        except DataError as error:
            note(f"Not shown: {error}.")
            continue
        if timeline := timeline_of(events, num_steps):
            return timeline
    return None


def timeline_of(events: Sequence[Event], num_steps: int = STEPS_SHOWN) -> Timeline | None:
    """Return the last ``num_steps`` steps of a trace; None if it has none."""
    tracks = {
        event["tid"]: event["args"]["name"]
        for event in events
        if event.get("name") == "thread_name"
    }
    steps = [
        (event["args"]["step"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in events
        if event["ph"] == "X" and tracks[event["tid"]] == STEPS
    ][-num_steps:]
    if not steps:
        return None
    began_s, ended_s = steps[0][1], steps[-1][2]
    return Timeline(
        began_s=began_s,
        ended_s=ended_s,
        steps=steps,
        spans=_spans(events, tracks, began_s, ended_s),
        instants=_instants(events, tracks, began_s, ended_s),
        counters=_counters(events, began_s, ended_s),
    )


def draw_timeline(timeline: Timeline, colours: Mapping[str, Colour]) -> Figure:
    """Draw a row of bars per stage over seconds, then the weight versions and the queues."""
    sketch = _Sketch(timeline)
    for stage, spans in timeline.spans.items():
        sketch.stage(stage, spans, timeline.instants.get(stage, ()), colours.get(stage, "c7"))
    if versions := timeline.instants.get(WEIGHTS):
        sketch.versions(versions)
    for name, values in timeline.counters.items():
        sketch.area(name.replace("_", " "), values, "stack c7")
    first, last = timeline.steps[0][0], timeline.steps[-1][0]
    which = f"steps {first:,} to {last:,}" if first != last else f"step {first:,}"
    return Figure(
        title=f"Timeline of {which}",
        svg=sketch.picture(),
        legend=(),
        wide=True,
        note=f"Dashed: ends of steps. The whole run is in {TRACE_FILE}, for ui.perfetto.dev.",
    )


# --- Reading ------------------------------------------------------------------------------------


def _spans(
    events: Iterable[Event], tracks: Mapping[int, str], began_s: float, ended_s: float
) -> dict[str, list[Span]]:
    """The spans in the window, by stage; one without an end lasts to the window's end."""
    found: dict[int, list[Span]] = {row: [] for row in sorted(tracks)}
    begun: dict[int, Event] = {}

    def add(begin: Event, end_s: float) -> None:
        start_s = begin["ts"] / 1e6
        if end_s > began_s and start_s < ended_s:
            row = begin["tid"]
            found[row].append(Span(row=row, name=begin["name"], began_s=start_s, ended_s=end_s))

    for event in events:
        if event["ph"] == "B":
            begun[event["tid"]] = event
        elif event["ph"] == "E" and event["tid"] in begun:
            add(begun.pop(event["tid"]), event["ts"] / 1e6)
    for begin in begun.values():
        add(begin, ended_s)
    stages: dict[str, list[Span]] = {}
    for row, spans in found.items():
        if spans:
            stages.setdefault(tracks[row], []).extend(spans)
    return stages


def _instants(
    events: Iterable[Event], tracks: Mapping[int, str], began_s: float, ended_s: float
) -> dict[str, list[tuple[str, float]]]:
    found: dict[str, list[tuple[str, float]]] = {}
    for event in events:
        if event["ph"] == "i" and began_s <= event["ts"] / 1e6 <= ended_s:
            found.setdefault(tracks[event["tid"]], []).append((event["name"], event["ts"] / 1e6))
    return found


def _counters(events: Iterable[Event], began_s: float, ended_s: float) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for event in events:
        if event["ph"] == "C" and event["ts"] / 1e6 <= ended_s:
            value = (event["ts"] / 1e6, event["args"]["value"])
            found.setdefault(event["name"], []).append(value)
    return {name: _since(values, began_s) for name, values in found.items()}


def _since(values: Sequence[Point], began_s: float) -> list[Point]:
    """Return the value at ``began_s`` and all later ones."""
    earlier = sum(at_s <= began_s for at_s, _ in values)
    return list(values[max(0, earlier - 1) :])


# --- Drawing ------------------------------------------------------------------------------------


class _Sketch(Drawing):
    """The picture: rows, each below the one before."""

    def __init__(self, timeline: Timeline, bottom: float = _TOP) -> None:
        super().__init__(_WIDTH)
        self.timeline = timeline
        self.bottom = bottom

    def x(self, at_s: float) -> float:
        """The pixel of a moment; one outside of the window is at its edge."""
        began_s, ended_s = self.timeline.began_s, self.timeline.ended_s
        share = (at_s - began_s) / (ended_s - began_s or 1.0)
        return _LEFT + min(max(share, 0.0), 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def stage(
        self,
        stage: str,
        spans: Sequence[Span],
        instants: Sequence[tuple[str, float]],
        colour: Colour,
    ) -> None:
        """Draw a bar per span; concurrent spans below one another."""
        rows = sorted({span.row for span in spans})
        if len(rows) > MAX_ROWS:
            self.area(stage, _open_at_once(spans), f"stack {colour}")
            return
        height = _BAR_HEIGHT if len(rows) == 1 else _SPLIT_HEIGHT * len(rows)
        self._label(stage, height)
        for index, row in enumerate(rows):
            for bar in self._bars([span for span in spans if span.row == row]):
                self.bar(
                    f"bar {colour}",
                    bar.left,
                    self.bottom + index * height / len(rows),
                    bar.width - (_SEAM if bar.width >= _SEPARABLE_WIDTH else 0.0),
                    height / len(rows) - (1.0 if len(rows) > 1 else 0.0),
                    bar.title(stage),
                )
        for name, at_s in instants:
            self._mark(at_s, self.bottom, self.bottom + height, f"{stage}: {name}")
        self.bottom += height + _GAP

    def versions(self, instants: Sequence[tuple[str, float]]) -> None:
        """Draw a mark where a version came into use, and its number if there is room."""
        self._label(WEIGHTS, _BAR_HEIGHT)
        free_from = _LEFT
        for name, at_s in instants:
            x = self.x(at_s)
            self._mark(at_s, self.bottom, self.bottom + _BAR_HEIGHT, name)
            fits_right = x + _LABEL_WIDTH < _WIDTH
            if x - (0.0 if fits_right else _LABEL_WIDTH) < free_from:
                continue
            label, at_y = name.replace("version ", "v"), self.bottom + 14
            if fits_right:
                self.text("tick", x + 5, at_y, label)
            else:
                self.text("tick", x - 5, at_y, label, "end")
            free_from = x + _LABEL_WIDTH
        self.bottom += _BAR_HEIGHT + _GAP

    def picture(self) -> Markup:
        """The whole picture, on top of the steps' limits and the axis."""
        frame = _Sketch(self.timeline, bottom=self.bottom)
        frame.limits()
        frame.axis()
        frame.parts += self.parts
        return frame.svg(self.bottom + _AXIS, "timeline")

    def limits(self) -> None:
        """Draw the limits and names of the steps."""
        for step, began_s, ended_s in self.timeline.steps:
            left, right = self.x(began_s), self.x(ended_s)
            self.line("limit", right, right, 4, self.bottom)
            if right - left > 2 * _LABEL_WIDTH:
                self.text("tick", (left + right) / 2, 14, f"step {step:,}", "middle")

    def axis(self) -> None:
        """Draw the axis: seconds since the window's begin."""
        length_s = self.timeline.ended_s - self.timeline.began_s
        marks = ticks(0.0, length_s, 8) if length_s else [0.0]
        spacing = marks[1] - marks[0] if len(marks) > 1 else 1.0
        for tick in marks:
            x = self.x(self.timeline.began_s + tick)
            self.line("grid", x, x, _TOP - 4, self.bottom)
            label = tick_label(tick, spacing, "seconds")
            self.text("tick", x, self.bottom + 17, label, "middle")

    def _bars(self, spans: Sequence[Span]) -> list["_Bar"]:
        """The spans of one row as bars; spans too close to be distinguished share a bar."""
        bars: list[_Bar] = []
        for span in spans:
            left = self.x(span.began_s)
            bar = _Bar(left, max(self.x(span.ended_s), left + _SMALLEST_WIDTH), [span])
            before = bars[-1] if bars else None
            if before is not None and before.absorbs(bar):
                before.right = max(before.right, bar.right)
                before.spans.append(span)
            else:
                bars.append(bar)
        return bars

    def area(self, name: str, values: Sequence[Point], css: str) -> None:
        """Draw a value over time, from 0 to its largest."""
        largest = max(value for _, value in values)
        self._label(name, _QUEUE_HEIGHT, f"max {number(largest)}")
        self.bottom += _QUEUE_HEIGHT
        self.steps(
            css,
            self._columns(values),
            largest=largest,
            base=self.bottom,
            height=_QUEUE_HEIGHT,
            left=self.x(values[0][0]),
            right=self.x(self.timeline.ended_s),
        )
        self.bottom += _GAP

    def _columns(self, values: Sequence[Point]) -> list[Point]:
        """(pixel, value): the largest of the values within a pixel, then the last one."""
        columns: dict[int, list[float]] = {}
        for at_s, value in values:
            columns.setdefault(round(self.x(at_s)), []).append(value)
        return [
            point
            for x, inside in columns.items()
            for point in ((x, max(inside)), (x + 0.5, inside[-1]))
        ]

    def _mark(self, at_s: float, top: float, bottom: float, title: str) -> None:
        self.add(
            '<g class="mark"><line x1="{x:.1f}" x2="{x:.1f}" y1="{a:.1f}" y2="{b:.1f}"/>'
            "<title>{title}</title></g>",
            x=self.x(at_s),
            a=top,
            b=bottom,
            title=title,
        )

    def _label(self, name: str, height: float, below: str = "") -> None:
        middle = self.bottom + height / 2 + (-2 if below else 5)
        short = name if len(name) <= _LABEL_LENGTH else f"{name[: _LABEL_LENGTH - 1]}…"
        self.text("row", _LEFT - 12, middle, short, "end")
        if below:
            self.text("tick", _LEFT - 12, middle + 15, below, "end")


@dataclass
class _Bar:
    """Spans of one row that share a bar; left and right in pixels."""

    left: float
    right: float
    spans: list[Span]

    @property
    def width(self) -> float:
        return self.right - self.left

    def absorbs(self, other: "_Bar") -> bool:
        """Whether the next bar touches this one and one of the two is too narrow to be seen."""
        touches = other.left - self.right < _SMALLEST_WIDTH / 2
        return touches and min(self.width, other.width) < _SEPARABLE_WIDTH

    def title(self, stage: str) -> str:
        if len(self.spans) > 1:
            busy_s = sum(span.ended_s - span.began_s for span in self.spans)
            return f"{stage}: {len(self.spans)} spans, {duration(busy_s)}"
        (span,) = self.spans
        name = f"{stage}: {span.name}" if span.name != stage else stage
        return f"{name}, {duration(span.ended_s - span.began_s)}"


def _open_at_once(spans: Sequence[Span]) -> list[Point]:
    """(moment, number of open spans) wherever that number changes."""
    changes = sorted([(span.began_s, 1) for span in spans] + [(span.ended_s, -1) for span in spans])
    values: list[Point] = []
    count = 0
    for at_s, change in changes:
        count += change
        values.append((at_s, count))
    return values
