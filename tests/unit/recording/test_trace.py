"""The trace on a clock that is set by hand."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen3_distill.errors import DataError, RunFolderError
from qwen3_distill.recording.jsonl import combine
from qwen3_distill.recording.trace import FILES_KEPT, WEIGHTS, Event, Trace, read_trace


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


def events(path: Path, kind: str) -> list[Event]:
    return [event for event in read_trace(path) if event["ph"] == kind]


def row_names(path: Path) -> dict[int, str]:
    named = [e for e in read_trace(path) if e["ph"] == "M" and e["name"] == "thread_name"]
    return {event["tid"]: event["args"]["name"] for event in named}


def spans(path: Path) -> list[tuple[str, str, int, int]]:
    """(row, name, begin, end), each end matched with the last begin of its row."""
    names, begun = row_names(path), dict[int, Event]()
    found: list[tuple[str, str, int, int]] = []
    for event in read_trace(path):
        if event["ph"] == "B":
            assert event["tid"] not in begun, "two spans on one row"
            begun[event["tid"]] = event
        elif event["ph"] == "E":
            begin = begun.pop(event["tid"])
            found.append((names[begin["tid"]], begin["name"], begin["ts"], event["ts"]))
    return found


# --- Times of a step ----------------------------------------------------------------------------


def test_idle_is_what_no_span_of_the_stage_covers(clock: Clock) -> None:
    trace = Trace(now=clock)
    clock.wait(5)  # loading: belongs to no step
    trace.begin_steps()
    with trace.span("generate"):
        clock.wait(6)
    clock.wait(1)  # nobody does anything
    with trace.span("train"):
        clock.wait(3)
    times = trace.end_step(1)
    assert times.wall_s == pytest.approx(10)
    assert times.busy_s["generate"] == pytest.approx(6)
    assert times.idle_fractions == pytest.approx(
        {"generate": 0.4, "score": 1.0, "train": 0.7, "publish": 1.0, "all": 0.1}
    )


def test_spans_that_end_in_another_order_than_they_began(clock: Clock, path: Path) -> None:
    trace = Trace(path, now=clock)
    first, second = trace.span("score", "first"), trace.span("score", "second")
    first.__enter__()
    clock.wait(1)
    second.__enter__()
    clock.wait(1)
    first.__exit__(None, None, None)
    clock.wait(1)
    second.__exit__(None, None, None)
    assert trace.busy_seconds("score") == pytest.approx(3)
    assert spans(path) == [
        ("score", "first", 0, 2_000_000),
        ("score", "second", 1_000_000, 3_000_000),
    ]
    with trace.span("score", "third"):  # a row that is free again
        assert len(row_names(path)) == 2


def test_a_span_ends_when_its_block_fails(clock: Clock, path: Path) -> None:
    trace = Trace(path, now=clock)

    def work() -> None:
        clock.wait(1)
        raise RuntimeError("engine")

    with pytest.raises(RuntimeError, match="engine"), trace.span("score"):
        work()
    clock.wait(9)
    assert trace.end_step(1).idle_fractions["score"] == pytest.approx(0.9)
    assert spans(path) == [("score", "score", 0, 1_000_000)]


def test_the_step_s_metrics(clock: Clock) -> None:
    trace = Trace(now=clock)
    trace.counter("rollouts_in_flight", 8)
    with trace.span("generate"):
        clock.wait(3)
    trace.counter("rollouts_in_flight", 2)
    with trace.span("evaluate"):
        clock.wait(1)
    values = combine(trace.end_step(1).metrics())
    assert values == pytest.approx(
        {
            "time/step_s": 4,
            "time/generate_s": 3,
            "time/score_s": 0,
            "time/train_s": 0,
            "time/publish_s": 0,
            "time/evaluate_s": 1,
            "time/checkpoint_s": 0,
            "idle/generate_fraction": 0.25,
            "idle/score_fraction": 1,
            "idle/train_fraction": 1,
            "idle/publish_fraction": 1,
            "idle/all_fraction": 0,
            "queue/rollouts_in_flight_mean": (3 * 8 + 1 * 2) / 4,
            "queue/rollouts_in_flight_max": 8,
        }
    )
    clock.wait(4)
    second = combine(trace.end_step(2).metrics())
    assert second["queue/rollouts_in_flight_mean"] == second["queue/rollouts_in_flight_max"] == 2


# --- The file -----------------------------------------------------------------------------------


def small_run(path: Path, clock: Clock) -> Trace:
    trace = Trace(path, now=clock, title="demo")
    with trace.span("generate", "step 1", rollouts=4):
        clock.wait(1)
        trace.counter("waiting", 2)
    trace.instant(WEIGHTS, "version 1", step=1)
    trace.end_step(1)
    return trace


def test_the_file_is_json_that_names_its_rows(path: Path, clock: Clock) -> None:
    small_run(path, clock).close()
    content = json.loads(path.read_text())
    assert content == read_trace(path)
    assert content[0]["name"] == "process_name"
    assert content[0]["args"]["name"].startswith("demo, ")
    assert spans(path) == [("generate", "step 1", 0, 1_000_000)]
    assert events(path, "B")[0]["args"] == {"rollouts": 4}
    (counter,) = events(path, "C")
    assert (counter["name"], counter["ts"], counter["args"]) == ("waiting", 10**6, {"value": 2})
    (version,) = events(path, "i")
    assert row_names(path)[version["tid"]] == WEIGHTS
    (step,) = events(path, "X")
    assert (step["ts"], step["dur"]) == (0, 1_000_000)
    assert step["args"] == {
        "step": 1,
        "idle": {"generate": 0, "score": 1, "train": 1, "publish": 1, "all": 0},
    }


def test_rows_are_listed_in_the_order_of_the_data(path: Path, clock: Clock) -> None:
    trace = Trace(path, now=clock)
    for stage in ("mystery", "train", "generate"):
        with trace.span(stage):
            pass
    trace.instant(WEIGHTS, "version 1")
    order = {
        row_names(path)[event["tid"]]: event["args"]["sort_index"]
        for event in read_trace(path)
        if event.get("name") == "thread_sort_index"
    }
    assert sorted(order, key=lambda name: order[name]) == ["generate", "train", WEIGHTS, "mystery"]


def test_what_a_killed_run_leaves_is_readable_wherever_it_was_cut(
    path: Path, tmp_path: Path, clock: Clock
) -> None:
    small_run(path, clock).close()
    content, whole = path.read_bytes(), read_trace(path)
    cut = tmp_path / "cut.json"
    boundaries = 0
    for length in range(len(content) + 1):
        cut.write_bytes(content[:length])
        left = read_trace(cut)
        assert left == whole[: len(left)]
        if content[length : length + 2] == b",\n":
            # What viewers do with a file that ends after an event: they add the bracket.
            assert json.loads(content[:length] + b"]") == left
            boundaries += 1
    assert boundaries == len(whole) - 1


KILLED = """
import sys
from pathlib import Path
from qwen3_distill.recording.trace import Trace
trace = Trace(Path(sys.argv[1]))
for step in range(10**9):
    with trace.span("generate", step=step), trace.span("score"):
        trace.counter("waiting", step)
    trace.end_step(step)
"""


def test_every_event_of_a_killed_process_is_in_the_file(path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)])
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_size < 20_000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    content = path.read_text()
    assert not content.endswith("]\n")
    assert len(json.loads(content + "]")) == len(read_trace(path)) > 50


def test_another_start_has_a_file_of_its_own(path: Path, clock: Clock) -> None:
    for number in range(1, FILES_KEPT + 3):
        trace = Trace(path, now=clock)
        trace.instant(WEIGHTS, f"start {number}")
        if number % 2:  # every second one is killed
            trace.close()
    starts = {file.name: events(file, "i")[0]["name"] for file in path.parent.glob("trace*.json")}
    newest = FILES_KEPT + 2
    assert starts == {
        "trace.json": f"start {newest}",
        "trace-1.json": f"start {newest - 1}",
        "trace-2.json": f"start {newest - 2}",
        "trace-3.json": f"start {newest - 3}",
    }


def test_a_full_file_is_put_aside_and_open_spans_go_on_in_the_next(
    path: Path, clock: Clock
) -> None:
    trace = Trace(path, now=clock, limit_bytes=4000)
    with trace.span("generate", "long"):
        for step in range(40):
            clock.wait(1)
            trace.end_step(step)
    end = clock.now
    trace.close()
    first, second = path.with_name("trace-1.json"), path
    assert len(list(path.parent.iterdir())) == 2
    assert 4000 <= first.stat().st_size < 4400
    for file in (first, second):
        assert json.loads(file.read_text()) == read_trace(file)
        assert set(row_names(file).values()) == {"generate", "steps"}
    assert spans(second) == [("generate", "long", 0, round(1e6 * (end - 1000)))]


def test_traces_are_bounded(path: Path, clock: Clock) -> None:
    trace = Trace(path, now=clock, limit_bytes=2000)
    for step in range(2000):
        with trace.span("train"):
            clock.wait(1)
        trace.end_step(step)
    files = list(path.parent.iterdir())
    assert len(files) == FILES_KEPT
    assert sum(file.stat().st_size for file in files) < FILES_KEPT * 2500
    assert events(path, "X")[-1]["name"] == "step 1999"


def test_quick_changes_of_a_counter_are_thinned(path: Path, clock: Clock) -> None:
    trace = Trace(path, now=clock)
    for value in range(1000):
        trace.counter("waiting", value)
        clock.wait(0.001)
    times = trace.end_step(1)
    values = [(event["ts"], event["args"]["value"]) for event in events(path, "C")]
    assert 40 <= len(values) <= 101
    assert values == sorted(values)
    assert values[0] == (0, 0)
    assert values[-1] == (999_000, 999)  # what holds at the end is never left out
    assert times.counters["waiting"] == pytest.approx((499.5, 999))


def test_a_value_that_held_for_a_while_is_in_the_file(path: Path, clock: Clock) -> None:
    trace = Trace(path, now=clock)
    trace.counter("waiting", 1)
    clock.wait(0.001)
    trace.counter("waiting", 7)  # too soon to be written at once
    clock.wait(1)
    trace.counter("waiting", 0)
    values = [(event["ts"], event["args"]["value"]) for event in events(path, "C")]
    assert values == [(0, 1), (1_000, 7), (1_001_000, 0)]


def test_a_value_that_stays_is_written_once(path: Path, clock: Clock) -> None:
    trace = Trace(path, now=clock)
    for _ in range(10):
        trace.counter("waiting", 4)
        clock.wait(1)
    assert len(events(path, "C")) == 1


def test_spans_may_end_after_the_file(path: Path, clock: Clock) -> None:
    trace = Trace(path, now=clock)
    with trace.span("generate"):
        trace.close()
        trace.close()
    assert json.loads(path.read_text())


def test_a_full_disk_is_named_and_leaves_whole_events(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace(path, now=clock)
    real_write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 20:
            return real_write(descriptor, data[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole = read_trace(path)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RunFolderError, match=r"trace\.json.*No space left.*logging\.trace"):
        trace.instant(WEIGHTS, "version 1")
    monkeypatch.undo()
    assert json.loads(path.read_text() + "]") == whole


def test_a_line_that_is_no_event_is_named(path: Path) -> None:
    path.write_text('[\n{"ph":"i"},\nnonsense,\n{"ph":"i"}\n]\n')
    with pytest.raises(DataError, match=r"trace\.json:3: not a trace event"):
        read_trace(path)
