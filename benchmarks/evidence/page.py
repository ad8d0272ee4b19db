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

from benchmarks.evidence.analyse import COMPARED, DECODINGS, LEVELS, TEMPERATURE, Decoding
from benchmarks.evidence.arms import ARMS
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
_WIDTH, _HEIGHT, _TOP, _BOTTOM, _PANEL = 1080, 400, 40, 326, 392
_LEFT: Mapping[Decoding, float] = {"greedy": 56, "sampled": 506}
_DECODING: Mapping[Decoding, str] = {"greedy": "greedy", "sampled": "T = 1"}
_ACCOUNTINGS = {
    "flops": "FLOPs",
    "flops_data_given": "FLOPs, SFT's data given",
    "flops_with_warm_start": "FLOPs with the warm start",
    "device_s": "GPU-seconds as measured",
    "projected_4b_from_8b_s": "projected: Qwen3-4B from 8B",
    "projected_4b_from_32b_s": "projected: Qwen3-4B from 32B",
}


def cost(row: Row, key: str) -> str:
    """Write a mean cost; with ``>`` and the seeds that got there, where some missed the level."""
    value = f"{row[key]:.2g}".replace("e+", "e")
    if row[f"{key}_reached"] == row["seeds"]:
        return value
    return f"> {value} ({row[f'{key}_reached']} of {row['seeds']})"


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Return a setting's rows in the order of the protocol's table of arms."""
    order = list(ARMS)
    return sorted(rows, key=lambda row: order.index(row["arm"]))


def costs_table(rows: Sequence[Row]) -> str:
    """FLOPs to each level at both decodings, an arm per line."""
    columns: list[tuple[Decoding, int]] = [(d, p) for d in DECODINGS for p in LEVELS]
    header = ["FLOPs to", *(f"{percent}%, {_DECODING[d]}" for d, percent in columns)]
    body = [
        [f"`{row['arm']}`", *(cost(row, f"{d}_flops_to_{percent}") for d, percent in columns)]
        for row in in_order(rows)
    ]
    return table(header, body)


def ends_table(rows: Sequence[Row], models: Row) -> str:
    """The last evaluation and what was forgotten, an arm per line, the student before first.

    Args:
        models: the setting's part of the models' file.
    """
    header = ["after the last step", "greedy, %", "T = 1, %", "tokens", "cut, %"]
    header += ["loss on warm data", "rate"]
    greedy, sampled = (models["student"][TEMPERATURE[decoding]] for decoding in DECODINGS)
    body = [
        [
            "student before",
            f"{100 * greedy['accuracy']:.1f}",
            f"{100 * sampled['accuracy']:.1f}",
            f"{sampled['mean_tokens']:.1f}",
            f"{100 * (1 - sampled['ended']):.1f}",
            f"{models['warm_data_loss']:.3f}",
            "",
        ]
    ]
    body += [
        [
            f"`{row['arm']}`",
            f"{100 * row['greedy']:.1f}",
            f"{100 * row['sampled']:.1f}",
            f"{row['sampled_tokens']:.1f}",
            f"{100 * row['sampled_truncated']:.1f}",
            f"{row['warm_data_loss']:.3f}",
            f"{row['learning_rate']:g}",
        ]
        for row in in_order(rows)
    ]
    return table(header, body)


def ratio(row: Row | None) -> str:
    """Write a ratio with its interval, marked where it is a bound; a dash where there is none."""
    if row is None:
        return "-"
    sign = {0: "", 1: "> ", -1: "< "}[row["bound"]]
    within = f" ({row['low']:.2f} to {row['high']:.2f})" if row["seeds"] > 1 else ""
    return f"{sign}{row['value']:.2f}{within}"


def _find(rows: Sequence[Row], **wanted: object) -> Row | None:
    return next((r for r in rows if all(r[key] == of for key, of in wanted.items())), None)


def flops_table(rows: Sequence[Row]) -> str:
    """SFT over OPD in marginal FLOPs, a level and decoding per line."""
    header = ["gap closed", "`sft_hard` / `opd_topk16`", "cheapest of each side", "which"]
    body: list[list[str]] = []
    for decoding in DECODINGS:
        for percent in LEVELS:
            here = [r for r in rows if (r["decoding"], r["percent"]) == (decoding, percent)]
            primary = _find(here, kind="sft_to_opd", accounting="flops")
            cheapest = _find(here, kind="sft_to_opd_cheapest", accounting="flops")
            which = f"`{cheapest['above']}` / `{cheapest['below']}`" if cheapest else ""
            level = f"{percent}%, {_DECODING[decoding]}"
            body.append([level, ratio(primary), ratio(cheapest), which])
    return table(header, body)


def accountings_table(rows: Sequence[Row]) -> str:
    """SFT over OPD at half of the gap, an accounting per line."""
    header = ["cost to 50% of the gap"]
    for decoding in DECODINGS:
        header += [f"primary, {_DECODING[decoding]}", f"cheapest, {_DECODING[decoding]}"]
    body = [
        [
            text,
            *(
                ratio(_find(rows, kind=kind, accounting=name, decoding=decoding, percent=50))
                for decoding in DECODINGS
                for kind in ("sft_to_opd", "sft_to_opd_cheapest")
            ),
        ]
        for name, text in _ACCOUNTINGS.items()
    ]
    return table(header, body)


def choices_table(rows: Sequence[Row]) -> str:
    """Other pairs of arms in FLOPs, a pair per line."""
    columns: list[tuple[Decoding, int]] = [(d, p) for d in DECODINGS for p in LEVELS[:2]]
    header = ["FLOPs, one over the other"]
    header += [f"{percent}%, {_DECODING[d]}" for d, percent in columns]
    body = [
        [
            f"`{above}` / `{below}`",
            *(ratio(_find(rows, kind=kind, decoding=d, percent=percent)) for d, percent in columns),
        ]
        for kind, (above, below) in COMPARED.items()
    ]
    return table(header, body)


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column left-aligned."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Plot:
    """Accuracy over the logarithm of FLOPs, a panel per decoding, a line per arm."""

    def __init__(self, curves: Sequence[Row], student: Row, teacher: Row) -> None:
        self._drawing = Drawing(_WIDTH)
        self._lines = {
            decoding: {
                arm: _mean_curve([c for c in curves if c["arm"] == arm], decoding) for arm in DRAWN
            }
            for decoding in DECODINGS
        }
        self._limits = {
            decoding: [(rows[TEMPERATURE[decoding]]["accuracy"], name) for rows, name in of]
            for decoding in DECODINGS
            for of in [((student, "before"), (teacher, "teacher"))]
        }
        costs = [x for of in self._lines.values() for line in of.values() for x, _ in line]
        self._low, self._high = math.log10(min(costs)), math.log10(max(costs))

    def svg(self, setting: str) -> str:
        """Draw all and return the file's text."""
        for decoding in DECODINGS:
            self._panel(decoding)
        x = _LEFT[DECODINGS[-1]] + _PANEL + 18
        for index, (arm, (name, _)) in enumerate(DRAWN.items()):
            top = _TOP + 14 + 20 * index
            self._drawing.dot(f"dot {arm}", x, top, 4)
            self._drawing.text("row", x + 10, top + 4, name)
        label = f"Accuracy by training FLOPs, greedy and at temperature 1, setting {setting}"
        colours = {arm: colour for arm, (_, colour) in DRAWN.items()}
        svg = self._drawing.file(_HEIGHT, label, colours)
        return svg.replace(
            "</style>", ".curve{fill:none;stroke:currentColor;stroke-width:2}</style>"
        )

    def _panel(self, decoding: Decoding) -> None:
        draw, left = self._drawing, _LEFT[decoding]
        draw.text("name", left, _TOP - 16, _DECODING[decoding])
        for tick in ticks(0.0, 1.0, 5):
            draw.line("grid", left, left + _PANEL, self._y(tick), self._y(tick))
            draw.text("tick", left - 8, self._y(tick) + 4, tick_label(tick, 0.2, "percent"), "end")
        for power in range(math.floor(self._low), math.ceil(self._high) + 1):
            for digit in (1, 2, 5):
                value = digit * 10.0**power
                if self._low <= math.log10(value) <= self._high:
                    x = self._x(decoding, value)
                    draw.line("grid", x, x, _TOP, _BOTTOM)
                    draw.text("tick", x, _BOTTOM + 18, f"{digit}e{power}", "middle")
        for accuracy, name in self._limits[decoding]:
            draw.line("limit", left, left + _PANEL, self._y(accuracy), self._y(accuracy))
            draw.text("tick", left + _PANEL - 4, self._y(accuracy) - 4, name, "end")
        draw.text("tick", left + _PANEL / 2, _BOTTOM + 40, "FLOPs, evaluation left out", "middle")
        for arm, line in self._lines[decoding].items():
            points = [(self._x(decoding, x), self._y(y)) for x, y in line]
            if points:
                draw.path(f"curve {arm}", points)
            for x, y in points:
                draw.dot(f"dot {arm}", x, y, 3)

    def _x(self, decoding: Decoding, flops: float) -> float:
        span = max(self._high - self._low, 1e-9)
        return _LEFT[decoding] + (math.log10(flops) - self._low) / span * _PANEL

    def _y(self, accuracy: float) -> float:
        return _BOTTOM - accuracy * (_BOTTOM - _TOP)


def _mean_curve(curves: Sequence[Row], decoding: Decoding) -> list[tuple[float, float]]:
    """(FLOPs, accuracy) at the evaluations that all seeds have."""
    if not curves:
        return []
    count = min(len(curve["step"]) for curve in curves)
    return [
        (
            sum(curve["flops"][at] for curve in curves) / len(curves),
            sum(curve[decoding][at] for curve in curves) / len(curves),
        )
        for at in range(count)
    ]


def section(result: Row, setting: str) -> str:
    """Return the text that the page has between the marks of a setting."""
    rows, ratios = result["tables"][setting], result["ratios"][setting]
    return "\n\n".join(
        (
            f"![accuracy by FLOPs](images/evidence-{setting}.svg)",
            "SFT over OPD; above 1, on-policy distillation is cheaper:",
            flops_table(ratios),
            accountings_table(ratios),
            "What each arm costs, mean over the seeds:",
            costs_table(rows),
            "Where each arm ends:",
            ends_table(rows, result["models"]["settings"][setting]),
            "Choices:",
            choices_table(ratios),
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
        plot = Plot(curves, rows["student"], rows["teacher"])
        image = arguments.images / f"evidence-{setting}.svg"
        image.write_text(plot.svg(setting), encoding="utf-8")
        page = replaced(page, setting, section(result, setting))
    arguments.page.write_text(page, encoding="utf-8")
    print(arguments.page)


if __name__ == "__main__":
    main()
