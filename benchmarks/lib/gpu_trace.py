"""Adds up the kernels that PyTorch's profiler recorded on a GPU."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_NAME_LENGTH = 110


class GpuWork(TypedDict):
    """Holds a GPU's work in a span of time, as JSON can."""

    kernels: dict[str, list[float]]
    """Count and microseconds of each."""
    busy_us: float
    span_us: float
    """From the first kernel's begin to the last one's end."""


def gpu_work(recorded: Any) -> GpuWork:
    """Return the work that a profile recorded."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        return added_up(json.loads(trace.read_text())["traceEvents"])


def added_up(events: Iterable[Mapping[str, Any]]) -> GpuWork:
    """Add up a trace's events; kernels that overlap keep the GPU busy once."""
    work = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e.get("cat") in _WORK and "dur" in e
    )
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    busy, end = 0.0, 0.0
    for start, stop, name in work:
        kernels[name][0] += 1
        kernels[name][1] += stop - start
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return GpuWork(kernels=dict(kernels), busy_us=busy, span_us=end - work[0][0] if work else 0.0)


def idle_share(work: GpuWork) -> float:
    """Return the share of the span in which nothing ran; 1 without any work."""
    return 1 - work["busy_us"] / work["span_us"] if work["span_us"] else 1.0


def category(kernel: str, marks: Mapping[str, Sequence[str]]) -> str:
    """Return the first category of which a mark is in the kernel's name."""
    low = kernel.lower()
    return next((name for name, some in marks.items() if any(m in low for m in some)), "other")


def milliseconds(
    work: GpuWork, marks: Mapping[str, Sequence[str]], *, units: float, largest: int
) -> dict[str, Any]:
    """Return the milliseconds of a unit of work: by category, and by kernel with its count."""
    by_category: dict[str, float] = defaultdict(float)
    for name, (_, total_us) in work["kernels"].items():
        by_category[category(name, marks)] += total_us / units / 1e3
    first = sorted(work["kernels"].items(), key=lambda item: -item[1][1])[:largest]
    return {
        "category_ms": {name: round(ms, 3) for name, ms in sorted(by_category.items())},
        "kernel_ms": {
            name[:_NAME_LENGTH]: [round(total / units / 1e3, 4), round(count / units, 2)]
            for name, (count, total) in first
        },
    }
