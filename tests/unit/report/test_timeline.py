"""The timeline of hand-made traces, as records and as drawn."""

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qwen3_distill.recording.trace import TRACE_FILE, WEIGHTS, Trace, read_trace
from qwen3_distill.report.report import write_report
from qwen3_distill.report.timeline import (
    MAX_ROWS,
    STEPS_SHOWN,
    Timeline,
    draw_timeline,
    load_timeline,
    timeline_of,
)

LEFT, WIDTH = 152.0, 940.0 - 152.0 - 14.0
"""Of the plot, in pixels."""


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def trace(tmp_path: Path, clock: Clock) -> Trace:
    return Trace(tmp_path / TRACE_FILE, now=clock)


def sequential(trace: Trace, clock: Clock, num_steps: int) -> None:
    """Steps of 3 + 1 + 4 seconds."""
    for step in range(1, num_steps + 1):
        with trace.span("generate"):
            clock.wait(3)
        with trace.span("score"):
            clock.wait(1)
        with trace.span("train"):
            clock.wait(4)
        trace.instant(WEIGHTS, f"version {step}", step=step)
        trace.end_step(step)


def loaded(folder: Path, num_steps: int = STEPS_SHOWN) -> Timeline:
    timeline = load_timeline(folder, num_steps)
    assert timeline is not None
    return timeline


# --- Reading --------------------------------------------------------------------------------------


def test_the_last_steps_are_shown(trace: Trace, clock: Clock, tmp_path: Path) -> None:
    sequential(trace, clock, 5)
    timeline = loaded(tmp_path, 2)
    assert timeline.steps == [(4, 24.0, 32.0), (5, 32.0, 40.0)]
    assert (timeline.began_s, timeline.ended_s) == (24.0, 40.0)
    assert list(timeline.spans) == ["generate", "score", "train"]
    times = [(span.began_s, span.ended_s) for span in timeline.spans["score"]]
    assert times == [(27.0, 28.0), (35.0, 36.0)]
    # Version 3 came into use in the moment in which step 4 began.
    names = [name for name, _ in timeline.instants[WEIGHTS]]
    assert names == ["version 3", "version 4", "version 5"]


def test_what_reaches_into_the_window_is_shown_and_what_does_not_is_left_out(
    trace: Trace, clock: Clock, tmp_path: Path
) -> None:
    with trace.span("generate", "before"):
        clock.wait(1)
    with trace.span("generate", "into"):
        clock.wait(1)
        trace.end_step(1)
        clock.wait(4)
    with trace.span("generate", "without an end"):
        clock.wait(5)
        trace.end_step(2)
        timeline = loaded(tmp_path, 1)
    spans = [(span.name, span.began_s, span.ended_s) for span in timeline.spans["generate"]]
    assert spans == [("into", 1.0, 6.0), ("without an end", 6.0, 11.0)]


def test_a_queue_begins_with_what_held_when_the_window_began(
    trace: Trace, clock: Clock, tmp_path: Path
) -> None:
    for value in (1, 2, 3):
        trace.counter("waiting", value)
        clock.wait(1)
    trace.end_step(1)
    clock.wait(1)
    trace.counter("waiting", 9)
    clock.wait(1)
    trace.end_step(2)
    clock.wait(1)
    trace.counter("waiting", 0)  # in no step yet
    assert loaded(tmp_path, 1).counters == {"waiting": [(2.0, 3), (4.0, 9)]}


def test_a_trace_without_steps_is_passed_over_for_the_one_before(
    trace: Trace, clock: Clock, tmp_path: Path
) -> None:
    sequential(trace, clock, 2)
    Trace(tmp_path / TRACE_FILE, now=clock).instant(WEIGHTS, "version 2")
    assert [step for step, _, _ in loaded(tmp_path).steps] == [1, 2]


def test_without_a_step_there_is_no_timeline(trace: Trace, tmp_path: Path) -> None:
    assert load_timeline(tmp_path / "elsewhere") is None
    assert load_timeline(tmp_path) is None
    assert timeline_of([]) is None


def test_the_trace_of_a_killed_run_is_drawn_wherever_it_was_cut(
    trace: Trace, clock: Clock, tmp_path: Path
) -> None:
    sequential(trace, clock, 3)
    events = read_trace(tmp_path / TRACE_FILE)
    drawn = 0
    for length in range(len(events) + 1):
        if timeline := timeline_of(events[:length]):
            picture(timeline)
            drawn += 1
    assert drawn > 10


# --- Drawing --------------------------------------------------------------------------------------


def picture(timeline: Timeline) -> ElementTree.Element:
    """The drawing, parsed: it is well-formed and has no NaN."""
    svg = str(draw_timeline(timeline, {"generate": "c1", "score": "c2", "train": "c3"}).svg)
    assert "nan" not in svg
    return ElementTree.fromstring(svg)


def bars(svg: ElementTree.Element, colour: str) -> list[tuple[float, float, float, float]]:
    """(x, width, y, height) of a stage's bars."""
    return [
        tuple(float(bar.attrib[key]) for key in ("x", "width", "y", "height"))  # type: ignore[misc]
        for bar in svg.iter("rect")
        if bar.attrib["class"] == f"bar {colour}"
    ]


def texts(svg: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in svg.iter("text")]


def test_a_bar_lies_where_its_span_does(trace: Trace, clock: Clock, tmp_path: Path) -> None:
    sequential(trace, clock, 4)
    svg = picture(loaded(tmp_path, 2))
    pixels_per_s = WIDTH / 16
    assert [x for x, *_ in bars(svg, "c2")] == pytest.approx(
        [LEFT + 3 * pixels_per_s, LEFT + 11 * pixels_per_s], abs=0.1
    )
    assert [width for _, width, *_ in bars(svg, "c3")] == pytest.approx(
        [4 * pixels_per_s] * 2, abs=1
    )
    rows = [y for colour in ("c1", "c2", "c3") for *_, y, _ in bars(svg, colour)[:1]]
    assert rows == sorted(set(rows))
    assert {"step 3", "step 4", "generate", "weights", "v3", "v4"} <= set(texts(svg))


def open_spans(trace: Trace, clock: Clock, count: int) -> None:
    """So many spans at one time, then a step's end."""
    spans = [trace.span("score", f"batch {index}") for index in range(count)]
    for span in spans:
        span.__enter__()
    clock.wait(2)
    for span in spans:
        span.__exit__(None, None, None)
    clock.wait(2)
    trace.end_step(1)


def test_spans_at_one_time_lie_under_each_other(trace: Trace, clock: Clock, tmp_path: Path) -> None:
    open_spans(trace, clock, MAX_ROWS)
    drawn = bars(picture(loaded(tmp_path)), "c2")
    assert len(drawn) == MAX_ROWS
    assert len({x for x, *_ in drawn}) == 1
    ordered = sorted((y, height) for *_, y, height in drawn)
    for (y, height), (next_y, _) in itertools.pairwise(ordered):
        assert y + height < next_y


def test_more_spans_at_one_time_are_drawn_as_their_number(
    trace: Trace, clock: Clock, tmp_path: Path
) -> None:
    open_spans(trace, clock, MAX_ROWS + 1)
    svg = picture(loaded(tmp_path))
    assert bars(svg, "c2") == []
    assert f"max {MAX_ROWS + 1}" in texts(svg)
    (area,) = [path for path in svg.iter("path") if path.attrib["class"] == "stack c2"]
    corners = [
        tuple(map(float, pair)) for pair in re.findall(r"([\d.]+),([\d.]+)", area.attrib["d"])
    ]
    top, base = min(y for _, y in corners), max(y for _, y in corners)
    high = [x for x, y in corners if y == top]
    assert min(high) == pytest.approx(LEFT, abs=1)
    assert max(high) == pytest.approx(LEFT + WIDTH / 2, abs=1)  # ended after half of the step
    assert corners[-1] == pytest.approx((LEFT + WIDTH, base), abs=0.1)


def test_what_lies_outside_of_the_window_is_cut_off(
    trace: Trace, clock: Clock, tmp_path: Path
) -> None:
    short = [trace.span("generate") for _ in range(3)]
    long = [trace.span("generate") for _ in range(MAX_ROWS + 1)]
    with trace.span("train"):
        for span in (*long, *short):
            span.__enter__()
        clock.wait(3)
        for span in short:
            span.__exit__(None, None, None)
        clock.wait(1)
        trace.end_step(1)
        clock.wait(1)
        trace.end_step(2)
        clock.wait(1)
    for span in long:
        span.__exit__(None, None, None)
    svg = picture(loaded(tmp_path, 1))
    ((x, width, *_),) = bars(svg, "c3")
    assert (x, width) == pytest.approx((LEFT, WIDTH), abs=1)
    assert f"max {MAX_ROWS + 1}" in texts(svg)  # those that ended before are not among them


def test_neighbours_too_narrow_to_be_seen_are_one_bar(
    trace: Trace, clock: Clock, tmp_path: Path
) -> None:
    for _ in range(20_000):
        with trace.span("train"):
            clock.wait(0.001)
    trace.end_step(1)
    figure = draw_timeline(loaded(tmp_path), {})
    assert "train: 20000 spans, 20.0 s" in figure.svg
    assert len(figure.svg) < 20_000


def test_wide_neighbours_are_told_apart(trace: Trace, clock: Clock, tmp_path: Path) -> None:
    for _ in range(4):
        with trace.span("train"):
            clock.wait(1)
    trace.end_step(1)
    drawn = sorted(bars(picture(loaded(tmp_path)), "c3"))
    assert len(drawn) == 4
    for (x, width, *_), (next_x, *_) in itertools.pairwise(drawn):
        assert 0.4 < next_x - (x + width) < 1.2


def test_a_drawing_of_a_busy_queue_stays_small(trace: Trace, clock: Clock, tmp_path: Path) -> None:
    for index in range(20_000):
        trace.counter("waiting", index % 7)
        clock.wait(0.03)
    trace.end_step(1)
    figure = draw_timeline(loaded(tmp_path), {})
    assert len(figure.svg) < 80_000
    assert "max 6" in texts(ElementTree.fromstring(str(figure.svg)))


def test_versions_in_quick_succession_are_all_marked_and_some_are_named(
    trace: Trace, clock: Clock, tmp_path: Path
) -> None:
    for version in range(200):
        trace.instant(WEIGHTS, f"version {version}")
        clock.wait(0.1)
    trace.end_step(1)
    svg = picture(loaded(tmp_path))
    assert len([mark for mark in svg.iter("g") if mark.attrib["class"] == "mark"]) == 200
    named = [text for text in texts(svg) if re.fullmatch(r"v\d+", text)]
    assert 10 < len(named) < 40


def test_names_cannot_break_the_page(trace: Trace, clock: Clock, tmp_path: Path) -> None:
    with trace.span("<b>", "</svg><script>"):
        clock.wait(1)
    trace.counter("</text>", 1)
    trace.instant(WEIGHTS, "<i>")
    trace.end_step(1)
    svg = draw_timeline(loaded(tmp_path), {}).svg
    assert "<script>" not in svg
    ElementTree.fromstring(str(svg))


def test_a_step_that_took_no_time_can_be_drawn(trace: Trace, tmp_path: Path) -> None:
    trace.counter("waiting", 0)
    trace.end_step(1)
    picture(loaded(tmp_path))


# --- In the report --------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [True, False], ids=["finished", "killed"])
def test_the_report_has_the_timeline(
    closed: bool, trace: Trace, clock: Clock, tmp_path: Path
) -> None:
    sequential(trace, clock, 6)
    if closed:
        trace.close()
    page = write_report(tmp_path, []).read_text()
    assert "Timeline of steps 3 to 6" in page
    assert page.count('class="bar c1"') == 4


def test_the_report_of_a_run_without_a_trace_has_none(tmp_path: Path) -> None:
    assert "Timeline" not in write_report(tmp_path, []).read_text()
