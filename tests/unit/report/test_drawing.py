"""The elements that all pictures share."""

from xml.etree import ElementTree

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
