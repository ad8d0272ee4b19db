"""The profile of the controller counts others' code for the package that calls it."""

from typing import Any

import pytest

from benchmarks.speed.host_profile import Function, dearest, seconds_by_part

FRAMES = ("/src/qwen3_distill/hosts/frames.py", 1, "read_frame")
WIRE = ("/src/qwen3_distill/scoring/sglang/wire.py", 1, "read_scores")
TYPES = ("/src/qwen3_distill/types.py", 1, "__post_init__")
LOADS = ("/lib/python3.11/json/__init__.py", 1, "loads")
DECODE = ("~", 0, "<built-in decode>")
LOOP = ("/lib/python3.11/asyncio/events.py", 1, "_run")


def taken(own_s: float, all_s: float, **callers: Any) -> tuple[Any, ...]:
    """An entry of `pstats`: calls twice, seconds with and without callees, and the callers."""
    return 2, 2, own_s, all_s, callers.get("by", {})


def by(**seconds: float) -> dict[Function, tuple[int, int, float, float]]:
    functions = {"frames": FRAMES, "wire": WIRE, "loads": LOADS, "decode": DECODE, "loop": LOOP}
    return {functions[name]: (1, 1, 0.0, value) for name, value in seconds.items()}


STATS: dict[Function, Any] = {
    LOOP: taken(0.5, 11.0),
    FRAMES: taken(1.0, 3.0, by=by(loop=3.0)),
    WIRE: taken(2.0, 7.5, by=by(loop=7.5)),
    TYPES: taken(0.25, 0.25, by=by(wire=0.25)),
    LOADS: taken(1.0, 4.0, by=by(frames=1.0, wire=3.0)),
    DECODE: taken(3.0, 3.0, by=by(loads=3.0)),
}


def test_others_code_counts_for_the_package_that_calls_it() -> None:
    """Frames caused a quarter of json's four seconds, the reader of scores the rest."""
    assert seconds_by_part(STATS) == pytest.approx(
        {"hosts": 2.0, "scoring": 5.0, "types": 0.25, "event_loop": 0.5}
    )


def test_functions_that_call_each_other_end() -> None:
    stats = STATS | {
        LOADS: taken(1.0, 4.0, by=by(decode=4.0)),
        DECODE: taken(3.0, 3.0, by=by(loads=3.0)),
    }
    seconds = seconds_by_part(stats)
    assert sum(seconds.values()) == pytest.approx(sum(entry[2] for entry in stats.values()))
    assert seconds["hosts"] == 1.0


def test_the_dearest_are_this_projects() -> None:
    assert [entry["function"] for entry in dearest(STATS, steps=2, count=2)] == [
        "scoring/sglang/wire.py:read_scores",
        "hosts/frames.py:read_frame",
    ]
    assert dearest(STATS, steps=2)[0]["with_callees_s"] == 3.75
