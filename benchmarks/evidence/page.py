"""The tables and pictures of docs/evidence.md, from the result of `analyse`.

    python -m benchmarks.evidence.page

Replaces what stands between the page's marks `<!-- figures of SETTING -->` and `<!-- end -->`, and
writes `docs/images/evidence-SETTING.svg`. The rest of the page is written by people.
"""

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.lib.common import RESULTS
from qwen3_distill.report.drawing import Drawing, tick_label, ticks

Row: TypeAlias = Mapping[str, Any]

PAGE = Path("docs/evidence.md")
IMAGES = Path("docs/images")
DRAWN = {
    "sft_hard": ("SFT, one epoch", "#e69f00"),
    "sft_soft": ("SFT, soft labels", "#cc3311"),
    "opd_sampled": ("OPD, sampled token", "#999999"),
    "opd_topk16": ("OPD, top 16", "#0072b2"),
    "opd_full_reverse": ("OPD, full", "#56b4e9"),
    "mixture": ("mixture, half", "#009e73"),
    "grpo": ("GRPO", "#aa4499"),
}
"""Arms in the picture, with colours that readers without full colour vision can tell apart."""
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 760, 400, 56, 24, 310, 560
_NAMES = {50: "50%", 80: "80%", 95: "95%"}


def cost(row: Row, key: str) -> str:
    """A mean cost; with ``>`` where a seed missed the level within the budget."""
    sign = "" if row[f"{key}_reached"] == row["seeds"] else "> "
    return f"{sign}{row[key]:.2g}".replace("e+", "e")


def arms_table(rows: Sequence[Row]) -> str:
    """FLOPs to each level, greedy, and the last evaluation, an arm per line."""
    header = ["arm", *(f"FLOPs to {name}" for name in _NAMES.values())]
    header += ["greedy, %", "temperature 1, %", "tokens", "cut, %", "loss on warm data", "rate"]
    body = [
        [
            f"`{row['arm']}`",
            *(cost(row, f"greedy_flops_to_{percent}") for percent in _NAMES),
            f"{100 * row['greedy']:.1f}",
            f"{100 * row['sampled']:.1f}",
            f"{row['sampled_tokens']:.1f}",
            f"{100 * row['sampled_truncated']:.1f}",
            f"{row['warm_data_loss']:.3f}",
            f"{row['learning_rate']:g}",
        ]
        for row in rows
    ]
    return table(header, body)


def ratios_table(rows: Sequence[Row]) -> str:
    """SFT over OPD in every accounting, at 95% of the gap and both decodings."""
    header = ["cost", "pair", "decoding", "SFT over OPD", "95% interval"]
    body = [
        [
            row["accounting"].replace("_", " "),
            f"`{row['sft']}` / `{row['opd']}`",
            "greedy" if row["decoding"] == "greedy" else "temperature 1",
            f"{ {0: '', 1: '> ', -1: '< '}[row['bound']] }{row['value']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}" if row["seeds"] > 1 else "",
        ]
        for row in rows
        if row["percent"] == 95
    ]
    return table(header, body)


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column left-aligned."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Plot:
    """Greedy accuracy over the logarithm of FLOPs, a line per arm: means over seeds."""

    def __init__(self, curves: Sequence[Row], before: float, teacher: float) -> None:
        self._drawing = Drawing(_WIDTH)
        self._lines = {arm: _mean_curve([c for c in curves if c["arm"] == arm]) for arm in DRAWN}
        costs = [x for line in self._lines.values() for x, _ in line]
        self._low, self._high = math.log10(min(costs)), math.log10(max(costs))
        self._before, self._teacher = before, teacher

    def svg(self, setting: str) -> str:
        """Draw all and return the file's text."""
        self._axes()
        for index, (arm, (name, _)) in enumerate(DRAWN.items()):
            line = self._lines[arm]
            if not line:
                continue
            points = [(self._x(x), self._y(y)) for x, y in line]
            self._drawing.path(f"curve {arm}", points)
            for x, y in points:
                self._drawing.dot(f"dot {arm}", x, y, 3)
            top = _TOP + 14 + 20 * index
            self._drawing.dot(f"dot {arm}", _RIGHT + 18, top, 4)
            self._drawing.text("row", _RIGHT + 28, top + 4, name)
        label = f"Greedy accuracy by training FLOPs, setting {setting}"
        colours = {arm: colour for arm, (_, colour) in DRAWN.items()}
        svg = self._drawing.file(_HEIGHT, label, colours)
        return svg.replace(
            "</style>", ".curve{fill:none;stroke:currentColor;stroke-width:2}</style>"
        )

    def _axes(self) -> None:
        draw = self._drawing
        for tick in ticks(0.0, 1.0, 5):
            draw.line("grid", _LEFT, _RIGHT, self._y(tick), self._y(tick))
            draw.text("tick", _LEFT - 8, self._y(tick) + 4, tick_label(tick, 0.2, "percent"), "end")
        for power in range(math.floor(self._low), math.ceil(self._high) + 1):
            if self._low <= power <= self._high:
                x = self._x(10.0**power)
                draw.line("grid", x, x, _TOP, _BOTTOM)
                draw.text("tick", x, _BOTTOM + 18, f"1e{power}", "middle")
        for accuracy, name in ((self._before, "before"), (self._teacher, "teacher")):
            draw.line("limit", _LEFT, _RIGHT, self._y(accuracy), self._y(accuracy))
            draw.text("tick", _RIGHT - 4, self._y(accuracy) - 4, name, "end")
        draw.text(
            "tick", (_LEFT + _RIGHT) / 2, _BOTTOM + 40, "FLOPs, evaluation left out", "middle"
        )

    def _x(self, flops: float) -> float:
        span = max(self._high - self._low, 1e-9)
        return _LEFT + (math.log10(flops) - self._low) / span * (_RIGHT - _LEFT)

    def _y(self, accuracy: float) -> float:
        return _BOTTOM - accuracy * (_BOTTOM - _TOP)


def _mean_curve(curves: Sequence[Row]) -> list[tuple[float, float]]:
    """(FLOPs, accuracy) at the evaluations that all seeds have."""
    if not curves:
        return []
    count = min(len(curve["step"]) for curve in curves)
    return [
        (
            sum(curve["flops"][at] for curve in curves) / len(curves),
            sum(curve["greedy"][at] for curve in curves) / len(curves),
        )
        for at in range(count)
    ]


def section(result: Row, setting: str) -> str:
    """Return the text that the page has between the marks of a setting."""
    return "\n\n".join(
        (
            f"![accuracy by FLOPs](images/evidence-{setting}.svg)",
            arms_table(result["tables"][setting]),
            ratios_table(result["ratios"][setting]),
        )
    )


def replaced(page: str, setting: str, content: str) -> str:
    """Return the page with a setting's figures.

    Raises:
        SystemExit: the page lacks the setting's marks.
    """
    begin, end = f"<!-- figures of {setting} -->", "<!-- end -->"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    if pattern.search(page) is None:
        raise SystemExit(f"{PAGE} lacks the marks {begin} and {end}; add them where they belong")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--result", type=Path, default=RESULTS / "evidence.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--images", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    if not arguments.result.is_file():
        raise SystemExit(f"{arguments.result} is not there; run benchmarks.evidence.analyse first")
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    page = arguments.page.read_text(encoding="utf-8")
    for setting in result["tables"]:
        rows = result["models"]["settings"][setting]
        curves = [curve for curve in result["curves"] if curve["setting"] == setting]
        plot = Plot(
            curves,
            rows["student"]["temperature_0"]["accuracy"],
            rows["teacher"]["temperature_0"]["accuracy"],
        )
        image = arguments.images / f"evidence-{setting}.svg"
        image.write_text(plot.svg(setting), encoding="utf-8")
        page = replaced(page, setting, section(result, setting))
    arguments.page.write_text(page, encoding="utf-8")
    print(arguments.page)


if __name__ == "__main__":
    main()
