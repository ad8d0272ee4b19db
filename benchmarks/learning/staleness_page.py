"""The tables and the plot of docs/measured/staleness.md, from the result of `staleness.py`.

python -m benchmarks.learning.staleness_page                 # tables on stdout
python -m benchmarks.learning.staleness_page --plot docs/images/staleness.svg
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from qwen3_distill.report.drawing import Drawing, tick_label, ticks

Row: TypeAlias = Mapping[str, Any]

REFERENCE = "staleness_0_current_truncated"
RESULT = Path(__file__).parents[1] / "results" / "staleness.json"
COLUMNS = tuple(
    (advantage, ratio)
    for advantage in ("current", "old")
    for ratio in ("truncated", "none", "ppo_clip")
)
RATIO_NAMES = {"truncated": "truncated ratio", "none": "no ratio", "ppo_clip": "PPO clip"}
COLOURS = {"truncated": "#0072b2", "none": "#e69f00", "ppo_clip": "#cc3311"}
"""By ratio; readers without full colour vision can tell them apart."""
_WIDTH, _HEIGHT, _TOP, _PANEL_WIDTH, _PANEL_HEIGHT = 760, 330, 34, 320, 220


def percent(of_seeds: Row | None) -> str:
    """``72.6 ± 1.9`` (half of the interval), or the mean alone without an interval."""
    if of_seeds is None:
        return ""
    mean = f"{100 * of_seeds['mean']:.1f}"
    return mean if of_seeds["low"] is None else f"{mean} ± {100 * half_width(of_seeds):.1f}"


def half_width(of_seeds: Row) -> float:
    return (of_seeds["high"] - of_seeds["low"]) / 2


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column left-aligned."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def staleness_table(cases: Sequence[Row]) -> str:
    """Accuracy by staleness and case."""
    by_key = {(c["staleness"], c["advantage"], c["ratio"]): c["accuracy"] for c in cases}
    header = ["staleness", *(f"{a}, {RATIO_NAMES[r]}" for a, r in COLUMNS)]
    body = [
        [str(k), *(percent(by_key.get((k, *column))) for column in COLUMNS)]
        for k in sorted({c["staleness"] for c in cases})
    ]
    return table(header, body)


def ranking(cases: Sequence[Row], staleness: int) -> str:
    """The cases of one staleness, best first, each compared with the reference."""
    found = [case for case in cases if case["staleness"] == staleness]
    found.sort(key=lambda case: -case["accuracy"]["mean"])
    body = [
        [
            f"{case['advantage']} advantage, {RATIO_NAMES[case['ratio']]}",
            percent(case["accuracy"]),
            percent(case["vs_reference"]),
            f"{100 * case['ratio_capped_fraction']:.1f}",
        ]
        for case in found
    ]
    header = [
        f"at staleness {staleness}",
        "accuracy, %",
        "against fresh, pp",
        "capped or clipped, %",
    ]
    return table(header, body)


def replay_table(result: Row) -> str:
    """Accuracy by law and budget, with the tokens used, compared with no replay."""
    baseline = next(case for case in result["cases"] if case["name"] == REFERENCE)
    body = [
        [
            name,
            percent(row["accuracy"]),
            percent(row["vs_reference"]),
            f"{row['generated_tokens'] / 1000:.1f} k",
            f"{row['learner_tokens'] / 1000:.1f} k",
        ]
        for name, row in [
            ("no replay", baseline),
            *((_replay_name(row), row) for row in result["replay_cases"]),
        ]
    ]
    header = ["replay", "accuracy, %", "against none, pp", "generated", "trained on"]
    return table(header, body)


def _replay_name(row: Row) -> str:
    return f"{row['law'].replace('_', ' ')}, equal {row['budget']} tokens"


@dataclass(frozen=True)
class _Panel:
    """One advantage's half of the plot."""

    drawing: Drawing
    advantage: str
    left: float
    stalenesses: Sequence[int]
    low: float
    high: float

    def y(self, accuracy: float) -> float:
        return _TOP + (self.high - accuracy) / (self.high - self.low) * _PANEL_HEIGHT

    def centre(self, staleness: int) -> float:
        slot = _PANEL_WIDTH / len(self.stalenesses)
        return self.left + slot * (self.stalenesses.index(staleness) + 0.5)

    def draw(self, cases: Sequence[Row]) -> None:
        self._axes()
        for case in cases:
            if case["advantage"] == self.advantage:
                self._dot(case)

    def _axes(self) -> None:
        draw, right, bottom = self.drawing, self.left + _PANEL_WIDTH, _TOP + _PANEL_HEIGHT
        draw.text("name", self.left, 20, f"{self.advantage} advantage")
        draw.text("tick", (self.left + right) / 2, bottom + 36, "staleness, steps", "middle")
        for tick in ticks(self.low, self.high, 10):
            draw.line("grid", self.left, right, self.y(tick), self.y(tick))
            label = tick_label(tick, 0.1, "percent")
            draw.text("tick", self.left - 8, self.y(tick) + 4, label, "end")
        for staleness in self.stalenesses:
            draw.text("tick", self.centre(staleness), bottom + 18, str(staleness), "middle")

    def _dot(self, case: Row) -> None:
        of_seeds, ratio = case["accuracy"], case["ratio"]
        x = self.centre(case["staleness"]) + 16 * (list(COLOURS).index(ratio) - 1)
        if of_seeds["low"] is not None:
            low, high = self.y(of_seeds["low"]), self.y(of_seeds["high"])
            self.drawing.line(f"whisker {ratio}", x, x, low, high)
        self.drawing.dot(f"dot {ratio}", x, self.y(of_seeds["mean"]), 4)


def plot(cases: Sequence[Row]) -> str:
    """Draw a panel per advantage: staleness on the x axis, accuracy with its interval on y."""
    stalenesses = sorted({case["staleness"] for case in cases})
    edges = [
        edge for case in cases for edge in case["accuracy"].values() if isinstance(edge, float)
    ]
    low, high = math.floor(10 * min(edges)) / 10, math.ceil(10 * max(edges)) / 10
    drawing = Drawing(_WIDTH)
    for advantage, left in (("current", 50.0), ("old", 430.0)):
        _Panel(drawing, advantage, left, stalenesses, low, high).draw(cases)
    for index, ratio in enumerate(COLOURS):
        drawing.dot(f"dot {ratio}", 50 + 140 * index, _HEIGHT - 14, 4)
        drawing.text("row", 60 + 140 * index, _HEIGHT - 10, RATIO_NAMES[ratio])
    return drawing.file(_HEIGHT, "Held-out accuracy by staleness, advantage and ratio", COLOURS)


def page(result: Row) -> str:
    """All tables."""
    cases = result["cases"]
    stale = sorted({case["staleness"] for case in cases} - {0})
    tables = [staleness_table(cases), *(ranking(cases, k) for k in stale)]
    if result["replay_cases"]:
        tables.append(replay_table(result))
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, help="write the plot to this file")
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    print(page(result))
    if arguments.plot is not None:
        arguments.plot.write_text(plot(result["cases"]), encoding="utf-8")


if __name__ == "__main__":
    main()
