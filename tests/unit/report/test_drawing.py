"""The elements that all pictures share."""

from xml.etree import ElementTree

from qwen3_distill.report.charts import Interval, draw_intervals
from qwen3_distill.report.drawing import Drawing

SVG = "{http://www.w3.org/2000/svg}"


def points(drawing: Drawing) -> list[tuple[float, float]]:
    (path,) = ElementTree.fromstring(drawing.file(40, "x", {})).iter(f"{SVG}path")
    corners = path.attrib["d"].removeprefix("M").removesuffix("Z").split("L")
    return [(float(x), float(y)) for x, y in (corner.split(",") for corner in corners)]


def test_a_value_holds_until_the_next_one() -> None:
    drawing = Drawing(100)
    drawing.steps("stack c1", [(20, 2), (60, 1)], largest=4, base=30, height=20, left=10, right=90)
    assert points(drawing) == [
        (10, 30),
        (20, 30),
        (20, 20),
        (60, 20),
        (60, 25),
        (90, 25),
        (90, 30),
    ]


def test_a_counter_that_never_left_zero_is_a_flat_line() -> None:
    drawing = Drawing(100)
    drawing.steps("stack c1", [(20, 0)], largest=0, base=30, height=20, left=10, right=90)
    assert {y for _, y in points(drawing)} == {30}


def test_a_file_has_its_own_style_and_escapes_what_is_written_into_it() -> None:
    drawing = Drawing(100)
    drawing.text("row", 1, 2, "</svg><script>")
    drawing.bar("bar train", 1, 2, 3, 4, title="<b>")
    svg = ElementTree.fromstring(drawing.file(40, 'a "label"', {"train": "#54a24b"}))
    assert svg.attrib["viewBox"] == "0 0 100 40"
    assert svg.attrib["aria-label"] == 'a "label"'
    (style,) = svg.iter(f"{SVG}style")
    assert ".train{color:#54a24b}" in (style.text or "")
    assert [text.text for text in svg.iter(f"{SVG}text")] == ["</svg><script>"]
    assert [title.text for title in svg.iter(f"{SVG}title")] == ["<b>"]


def test_the_names_of_intervals_have_room_at_the_left() -> None:
    """Names of a second decoding once began left of the picture."""
    names = ["teacher", "student before, greedy", "student before, temperature 0.25"]
    rows = [Interval(name=name, value=0.5, low=0.4, high=0.6, colour="c1") for name in names]
    svg = ElementTree.fromstring(draw_intervals(rows))
    ends = {text.text: float(text.attrib["x"]) for text in svg.iter() if text.text in names}
    widest = 5.7  # of a character, as drawn
    assert all(end >= widest * len(str(name)) for name, end in ends.items()), ends
    assert ends.keys() == set(names)
