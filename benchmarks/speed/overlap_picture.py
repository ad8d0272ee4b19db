"""A picture of several runs of `overlap.py` on one time axis, from their traces.

    python -m benchmarks.speed.overlap_picture --out docs/images/overlap.svg --seconds 75 \\
        sequential=runs/overlap/longtail8-sequential/trace.json \\
        streaming=runs/overlap/longtail8-streaming/trace.json

Each run is shown up to its last step's end. Where a trace has no counter of rollouts in flight (a
sequential run), generation is drawn as a bar.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen3_distill.recording.trace import read_trace
from qwen3_distill.report.drawing import Drawing, Point, tick_label, ticks
from qwen3_distill.report.timeline import Timeline, timeline_of

WIDTH, LEFT, RIGHT, ROW, GAP, TOP = 960.0, 80.0, 25.0, 22.0, 6.0, 10.0
COLOURS = {"generate": "#4c78a8", "score": "#f58518", "train": "#54a24b", "publish": "#b279a2"}


@dataclass(frozen=True)
class Panel:
    """One run's rows, a stage each, over its last ``seconds``."""

    drawing: Drawing
    timeline: Timeline
    seconds: float

    def x(self, at_s: float) -> float:
        """Pixels of a moment; one outside of the window is at its edge."""
        share = (at_s - (self.timeline.ended_s - self.seconds)) / self.seconds
        return LEFT + min(max(share, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)

    def draw(self, name: str, top: float) -> float:
        """Draw the panel and return the pixel below it."""
        self.drawing.text("name", LEFT, top + 12, name)
        top += ROW
        begun = top
        for stage in COLOURS:
            self.drawing.text("row", LEFT - 10, top + 15, stage, "end")
            in_flight = self.timeline.counters.get("in_flight")
            if stage == "generate" and in_flight:
                self._rollouts_in_flight(in_flight, top)
            else:
                self._spans(stage, top)
            top += ROW + GAP
        for _, _, end_s in self.timeline.steps:
            if self.timeline.ended_s - end_s < self.seconds:
                self.drawing.line("limit", self.x(end_s), self.x(end_s), begun - 4, top)
        return top + 2 * GAP

    def _rollouts_in_flight(self, values: Sequence[Point], top: float) -> None:
        by_pixel = {round(self.x(at_s)): value for at_s, value in values}
        self.drawing.steps(
            "stack generate",
            list(by_pixel.items()),
            largest=max(value for _, value in values),
            base=top + ROW,
            height=ROW,
            left=LEFT,
            right=WIDTH - RIGHT,
        )

    def _spans(self, stage: str, top: float) -> None:
        for span in self.timeline.spans.get(stage, ()):
            left, right = self.x(span.began_s), self.x(span.ended_s)
            if right > left:
                width = max(right - left - 0.5, 0.5)
                self.drawing.bar(f"bar {stage}", left, top, width, ROW)


def picture(runs: Sequence[tuple[str, Timeline]], seconds: float) -> str:
    """All runs under one another, over one axis."""
    panels, bottom = Drawing(WIDTH), TOP
    for name, timeline in runs:
        bottom = Panel(panels, timeline, seconds).draw(name, bottom)
    whole = Drawing(WIDTH)
    marks = ticks(0.0, seconds, 6)
    for tick in marks:
        x = LEFT + tick / seconds * (WIDTH - LEFT - RIGHT)
        whole.line("grid", x, x, TOP - 8, bottom)
        whole.text("tick", x, bottom + 16, tick_label(tick, marks[1], "seconds"), "middle")
    whole.parts += panels.parts
    return whole.file(bottom + 26, "What every stage did, run by run", COLOURS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", metavar="NAME=TRACE")
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    runs: list[tuple[str, Timeline]] = []
    for item in arguments.traces:
        name, _, path = item.partition("=")
        timeline = timeline_of(read_trace(Path(path)), num_steps=1 << 30)
        if timeline is None:
            parser.error(f"{path}: no step in it")
        runs.append((name, timeline))
    arguments.out.write_text(picture(runs, arguments.seconds))
    print(arguments.out)


if __name__ == "__main__":
    main()
