"""Runs of `overlap.py` side by side on one time axis, from their traces.

    python -m benchmarks.speed.overlap_picture --out docs/images/overlap.svg --seconds 75 \\
        sequential=runs/overlap/longtail8-sequential/trace.json \\
        streaming=runs/overlap/longtail8-streaming/trace.json

Each run is shown up to its last step's end. Where a trace has no counter of rollouts in flight (a
sequential run), generation is drawn as a bar.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from qwen3_distill.recording.trace import read_trace
from qwen3_distill.report.timeline import Timeline, timeline_of

WIDTH, LEFT, RIGHT, ROW, GAP, TOP = 960, 80, 25, 22, 6, 10
COLOURS = {"generate": "#4c78a8", "score": "#f58518", "train": "#54a24b", "publish": "#b279a2"}
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#444}.name{font-weight:600}"
    ".grid{stroke:#ddd}.limit{stroke:#999;stroke-dasharray:3 3}"
)


def panel(name: str, timeline: Timeline, seconds: float, top: float) -> tuple[list[str], float]:
    """SVG elements of one run, and where they end."""
    ended_s = timeline.ended_s

    def x(at_s: float) -> float:
        share = (at_s - (ended_s - seconds)) / seconds
        return LEFT + min(max(share, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)

    parts = [f'<text class="name" x="{LEFT}" y="{top + 12}">{name}</text>']
    top += ROW
    begun = top
    for stage, colour in COLOURS.items():
        middle = top + 15
        parts.append(f'<text x="{LEFT - 10}" y="{middle}" text-anchor="end">{stage}</text>')
        in_flight = timeline.counters.get("in_flight")
        if stage == "generate" and in_flight:
            most = max(value for _, value in in_flight)
            by_pixel = {round(x(at_s)): value for at_s, value in in_flight}
            corners = [f"{LEFT},{top + ROW}"]
            height = 0.0
            for pixel, value in by_pixel.items():
                corners.append(f"{pixel},{top + ROW - height:.1f}")
                height = value / most * ROW
                corners.append(f"{pixel},{top + ROW - height:.1f}")
            corners += [f"{WIDTH - RIGHT},{top + ROW - height:.1f}", f"{WIDTH - RIGHT},{top + ROW}"]
            parts.append(f'<path fill="{colour}" d="M{"L".join(corners)}Z"/>')
        else:
            for span in timeline.spans.get(stage, ()):
                left, right = x(span.began_s), x(span.ended_s)
                if right > left:
                    parts.append(
                        f'<rect fill="{colour}" x="{left:.1f}" y="{top}" height="{ROW}" '
                        f'width="{max(right - left - 0.5, 0.5):.1f}"/>'
                    )
        top += ROW + GAP
    for _, _, end_s in timeline.steps:
        if ended_s - end_s < seconds:
            parts.append(
                f'<line class="limit" x1="{x(end_s):.1f}" x2="{x(end_s):.1f}" '
                f'y1="{begun - 4}" y2="{top}"/>'
            )
    return parts, top + 2 * GAP


def picture(runs: Sequence[tuple[str, Timeline]], seconds: float) -> str:
    """All runs under one another, over one axis."""
    body: list[str] = []
    top = float(TOP)
    for name, timeline in runs:
        parts, top = panel(name, timeline, seconds, top)
        body += parts
    grid: list[str] = []
    for tick in range(0, int(seconds) + 1, 10):
        x = LEFT + tick / seconds * (WIDTH - LEFT - RIGHT)
        grid.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{top}"/>')
        grid.append(f'<text x="{x:.1f}" y="{top + 16}" text-anchor="middle">{tick} s</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 26:.0f}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="white"/>'
        f"{''.join([*grid, *body])}</svg>\n"
    )


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
