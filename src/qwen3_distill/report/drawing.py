"""Draws SVG elements, axis ticks and labels for all pictures of the report and benchmarks.

An element has CSS classes and no colours. The report's page gives the classes their colours, in
light, dark and print; a picture in a file of its own brings a style with it (`Drawing.file`).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

from markupsafe import Markup

from qwen3_distill.recording.text import duration, number, percent

Point: TypeAlias = tuple[float, float]
Format: TypeAlias = Literal["number", "percent", "seconds"]
Colour: TypeAlias = Literal["c1", "c2", "c3", "c4", "c5", "c6", "c7", "muted"]

FORMATS: Mapping[Format, Callable[[float], str]] = {
    "number": number,
    "percent": percent,
    "seconds": duration,
}

_FILE_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#444}.name{font-weight:600}"
    ".grid{stroke:#ddd}.limit{stroke:#999;stroke-dasharray:3 3}"
    ".bar,.stack,.dot{fill:currentColor}.whisker{stroke:currentColor;stroke-width:2}"
)


class Drawing:
    """Elements of one SVG, in the order in which they are painted. All lengths are pixels.

    ``css`` is the element's classes: what it is (``grid``, ``line``, ``bar``, ...), and its colour.
    """

    def __init__(self, width: float) -> None:
        self.width = width
        self.parts: list[Markup] = []

    def add(self, template: str, **values: object) -> None:
        """Add an element, its values escaped."""
        self.parts.append(Markup(template).format(**values))

    def line(self, css: str, x1: float, x2: float, y1: float, y2: float) -> None:
        template = '<line class="{css}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'
        self.add(template, css=css, x1=x1, x2=x2, y1=y1, y2=y2)

    def text(
        self,
        css: str,
        x: float,
        y: float,
        label: str,
        anchor: Literal["start", "middle", "end"] = "start",
    ) -> None:
        template = (
            '<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{label}</text>'
        )
        self.add(template, css=css, x=x, y=y, anchor=anchor, label=label)

    def dot(self, css: str, x: float, y: float, radius: float) -> None:
        template = '<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>'
        self.add(template, css=css, x=x, y=y, radius=radius)

    def bar(
        self, css: str, left: float, top: float, width: float, height: float, title: str = ""
    ) -> None:
        """Draw a filled rectangle; ``title`` shows under the pointer."""
        self.add(
            '<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}">'
            "{title}</rect>",
            css=css,
            x=left,
            y=top,
            w=width,
            h=height,
            title=Markup("<title>{}</title>").format(title) if title else "",
        )

    def path(self, css: str, points: Sequence[Point], *, closed: bool = False) -> None:
        """Draw straight lines from point to point; with ``closed``, an area."""
        steps = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add('<path class="{css}" d="M{d}{end}"/>', css=css, d=steps, end="Z" if closed else "")

    def steps(
        self,
        css: str,
        columns: Sequence[Point],
        *,
        largest: float,
        base: float,
        height: float,
        left: float,
        right: float,
    ) -> None:
        """Draw the area under a value that holds until the next one, from ``left`` to ``right``.

        Args:
            columns: (pixel, value), from left to right.
            largest: the value that is drawn ``height`` pixels above ``base``.
        """
        top = base
        corners = [(left, base)]
        for x, value in columns:
            corners.append((x, top))
            top = base - value / (largest or 1.0) * height
            corners.append((x, top))
        self.path(css, [*corners, (right, top), (right, base)], closed=True)

    def svg(self, height: float, label: str, data: object = None) -> Markup:
        """Return the picture as part of a page.

        Args:
            label: its description, for screen readers.
            data: JSON for the page's script, in the attribute ``data-chart``.
        """
        hover = Markup("")
        if data is not None:
            content = json.dumps(data, separators=(",", ":"))
            hover = Markup(' data-chart="{}"').format(content)
        return Markup(
            '<svg viewBox="0 0 {w:.0f} {h:.0f}" role="img" aria-label="{label}"{hover}>{body}</svg>'
        ).format(w=self.width, h=height, label=label, hover=hover, body=Markup("").join(self.parts))

    def file(self, height: float, label: str, colours: Mapping[str, str]) -> str:
        """Return the picture as a file of its own, on white.

        Args:
            colours: by class, e.g. ``{"train": "#54a24b"}``.
        """
        style = _FILE_STYLE + "".join(f".{css}{{color:{code}}}" for css, code in colours.items())
        return str(
            Markup(
                '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:.0f} {h:.0f}" role="img" '
                'aria-label="{label}"><style>{style}</style>'
                '<rect width="100%" height="100%" fill="white"/>{body}</svg>\n'
            ).format(
                w=self.width,
                h=height,
                label=label,
                style=Markup(style),
                body=Markup("").join(self.parts),
            )
        )


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Return about ``count`` round numbers in ``[low, high]``; with ``whole``, integers."""
    step = round_step((high - low) / max(count, 1))
    if whole:
        step = 5.0 if step == 2.5 else max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def round_step(rough: float) -> float:
    """Round up to 1, 2, 2.5 or 5 times a power of ten; 1 if ``rough`` is not positive."""
    if rough <= 0:
        return 1.0
    size = 10.0 ** math.floor(math.log10(rough))
    return next(size * digit for digit in (1, 2, 2.5, 5, 10) if size * digit >= rough * 0.999)


def tick_label(value: float, spacing: float, y_format: Format) -> str:
    """Format a tick with just enough digits to distinguish it from its neighbours."""
    if y_format == "percent":
        value, spacing = 100 * value, 100 * spacing
    unit = {"percent": "%", "seconds": " s", "number": ""}[y_format]
    if spacing < 1e-4 and abs(value) < 1e-2:
        return f"{value:.2g}{unit}"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k{unit}"
    exact = (n for n in range(12) if math.isclose(spacing, round(spacing, n), rel_tol=1e-6))
    decimals = next(exact, 11)
    return f"{value:,.{decimals}f}{unit}"
