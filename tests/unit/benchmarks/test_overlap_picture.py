"""The picture of several runs on one time axis."""

from xml.etree import ElementTree

import pytest

from benchmarks.speed.overlap_picture import LEFT, RIGHT, ROW, WIDTH, picture
from qwen3_distill.report.timeline import Span, Timeline

SVG = "{http://www.w3.org/2000/svg}"


def timeline(**counters: list[tuple[float, float]]) -> Timeline:
    return Timeline(
        began_s=0,
        ended_s=30,
        steps=[(1, 0, 10), (2, 10, 30)],
        spans={"generate": [Span(row=1, name="generate", began_s=5, ended_s=25)]},
        instants={},
        counters=counters,
    )


def test_a_run_is_shown_up_to_its_last_step_s_end() -> None:
    svg = ElementTree.fromstring(picture([("one", timeline())], seconds=10))
    (bar,) = [rect for rect in svg.iter(f"{SVG}rect") if rect.get("class") == "bar generate"]
    assert float(bar.attrib["x"]) == LEFT  # begun before the window
    assert float(bar.attrib["width"]) == pytest.approx((WIDTH - LEFT - RIGHT) / 2 - 0.5, abs=0.1)
    limits = [line for line in svg.iter(f"{SVG}line") if line.get("class") == "limit"]
    assert [float(line.attrib["x1"]) for line in limits] == [WIDTH - RIGHT]
    assert {"one", "0 s", "10 s", "publish"} <= {text.text for text in svg.iter(f"{SVG}text")}


def test_rollouts_in_flight_take_the_place_of_generation_s_bars() -> None:
    runs = [("a", timeline()), ("b", timeline(in_flight=[(0, 8), (25, 4)]))]
    svg = ElementTree.fromstring(picture(runs, seconds=10))
    bars = [rect for rect in svg.iter(f"{SVG}rect") if rect.get("class") == "bar generate"]
    assert len(bars) == 1
    (area,) = svg.iter(f"{SVG}path")
    ys = [float(corner.split(",")[1]) for corner in area.attrib["d"].strip("MZ").split("L")]
    assert max(ys) - min(ys) == ROW
    assert ys[-2] == max(ys) - ROW / 2
