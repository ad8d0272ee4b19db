"""Writes ``trace.json`` for Perfetto: what every stage did and when.

The file is a Chrome trace in its JSON array format, one event per line. The format makes the
closing bracket optional, so the file of a killed run loads unchanged. Times are microseconds since
the trace began. Every start of a run writes a file of its own: days may lie between two starts, and
on one axis they would leave no room for the steps.

Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from qwen3_distill.errors import DataError, RunFolderError
from qwen3_distill.recording.clock import StepClock, StepTimes
from qwen3_distill.recording.jsonl import OCCASIONAL_STAGES, STEP_STAGES
from qwen3_distill.utils.json_text import parse_json

TRACE_FILE = "trace.json"
STEPS = "steps"
"""Track of the optimizer steps."""
WEIGHTS = "weights"
"""Track of the weight versions."""

FILE_LIMIT_BYTES = 32 << 20
"""A file that reaches this size is renamed, and a new one begun."""
FILES_KEPT = 4
"""Number of files that are kept, the current one included; older ones are deleted."""

_COUNTER_INTERVAL_S = 0.02
_PROCESS = 1
_TRACKS = (STEPS, *STEP_STAGES, *OCCASIONAL_STAGES, WEIGHTS)
"""Tracks in the order in which viewers list them; others follow in order of appearance."""
_LANES_PER_TRACK = 1000

Event: TypeAlias = dict[str, Any]


class Trace:
    """Spans, instants and counters of a run: summed by step (`StepClock`) and written to a file.

    The times of a step come from the same spans that the file shows. Without a path nothing is
    written. Not thread-safe; any number of tasks of one thread may have spans open.

    Args:
        path: the file. An existing one is renamed to ``trace-1.json``, that one to
            ``trace-2.json`` and so on, up to `FILES_KEPT`.
        title: names the process in the viewer.
        now: seconds of a clock that never goes back.

    Raises:
        RunFolderError: the file cannot be written. Every method that writes an event raises it.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        title: str = "run",
        now: Callable[[], float] = time.perf_counter,
        limit_bytes: int = FILE_LIMIT_BYTES,
    ) -> None:
        self._now = now
        self._began = now()
        self._clock = StepClock(self._began)
        self._counters: dict[str, _CounterMark] = {}
        self._lanes = _Lanes(on_new=self._write)
        self._open_spans: dict[int, Event] = {}
        """By lane: the event that began its span."""
        self._title = f"{title}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
        self._file: _TraceFile | None = None
        if path is not None:
            self._file = _TraceFile(path, limit_bytes, head=self._head)

    @contextmanager
    def span(self, stage: str, name: str = "", **arguments: object) -> Iterator[None]:
        """Record that a stage works while the block runs. Spans of one stage may overlap.

        Args:
            stage: ``generate``, ``score``, ...: its seconds become ``time/{stage}_s``.
            name: the span's name in the viewer; default: the stage.
            arguments: JSON values that the viewer shows with the span.
        """
        with self._recorded(stage, name, arguments, self._clock.enter, self._clock.leave):
            yield

    def add_members(self, members: Iterable[str]) -> None:
        """Give each engine of a fleet a track, in this order, also one that never works."""
        for member in members:
            self._clock.add_member(member)
            self._lanes.first(member)

    @contextmanager
    def member(self, member: str, work: str) -> Iterator[None]:
        """Record that an engine of a fleet works on something while the block runs.

        Its seconds become ``time/{member}_s``. The stage it works for has a span of its own.
        """
        clock = self._clock
        with self._recorded(member, work, {}, clock.enter_member, clock.leave_member):
            yield

    def instant(self, stage: str, name: str, **arguments: object) -> None:
        """Mark a moment on a stage's track, or on the track `WEIGHTS`."""
        lane = self._lanes.first(stage)
        self._write(
            self._event("i", lane, self._now(), name=name, cat=stage, s="t", args=arguments)
        )

    def counter(self, name: str, value: float) -> None:
        """Set a counter, such as the length of a queue.

        The file has at most one value per 20 ms, the last one; the step's metrics count them all.
        """
        now = self._now()
        self._clock.count(name, value, now)
        counter = self._counters.get(name)
        if counter is None:
            counter = self._counters[name] = _CounterMark(value, now)
        elif value != counter.value:
            if counter.is_due(now):  # it has held long enough to be seen
                self._write_counter(name, counter)
            counter.set(value, now)
        if counter.is_due(now):
            self._write_counter(name, counter)

    def busy_seconds(self, stage: str) -> float:
        """Seconds so far in which the stage had at least one span open."""
        return self._clock.busy_seconds(stage, self._now())

    def shares(self) -> dict[str, float]:
        """Seconds so far by stage and ``idle``; see `StepClock.shares`."""
        return self._clock.shares(self._now())

    def open_stages(self) -> dict[str, float]:
        """Map each stage that is at work to the Unix time since when. Any thread may ask."""
        now, wall = self._now(), time.time()
        began: dict[str, float] = {}
        for event in list(self._open_spans.values()):
            at = wall - (now - self._began) + event["ts"] / 1e6
            began[event["cat"]] = min(at, began.get(event["cat"], at))
        return began

    def begin_steps(self) -> None:
        """Begin the first step; the time before it belongs to no step."""
        self._clock.take_step(self._now())

    def end_step(self, step: int) -> StepTimes:
        """End a step, begin the next one, and return the times of the step that ended.

        Steps leave no gap: the work after a step, such as its checkpoint and evaluation, counts for
        the next one, which had to wait for it.
        """
        ended = self._now()
        began = self._clock.step_began
        times = self._clock.take_step(ended)
        shares = {stage: round(share, 4) for stage, share in times.idle_fractions.items()}
        arguments = {"step": step, "idle": shares}
        lane = self._lanes.first(STEPS)
        duration = self._microseconds(ended) - self._microseconds(began)
        self._write(
            self._event("X", lane, began, name=f"step {step}", dur=duration, args=arguments)
        )
        for name, counter in self._counters.items():
            if counter.is_pending:
                self._write_counter(name, counter)
        return times

    def close(self) -> None:
        """Close the file. Spans that end later are not written. May be called more than once."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @contextmanager
    def _recorded(
        self,
        track: str,
        name: str,
        arguments: dict[str, object],
        enter: Callable[[str, float], None],
        leave: Callable[[str, float], None],
    ) -> Iterator[None]:
        """Write a span on a track, and count it by ``enter`` and ``leave``."""
        began = self._now()
        enter(track, began)
        lane = self._lanes.take(track)
        event = self._event("B", lane, began, name=name or track, cat=track, args=arguments)
        self._open_spans[lane] = event
        try:
            self._write(event)
            yield
        finally:
            ended = self._now()
            leave(track, ended)
            self._lanes.release(track, lane)
            del self._open_spans[lane]
            self._write(self._event("E", lane, ended))

    def _head(self) -> Iterable[Event]:
        """The first events of a file: names, and the spans that are open."""
        process = {"ph": "M", "pid": _PROCESS, "name": "process_name"}
        return [
            {**process, "args": {"name": self._title}},
            *self._lanes.names(),
            *self._open_spans.values(),
        ]

    def _write(self, event: Event) -> None:
        if self._file is not None:
            self._file.write(event)

    def _write_counter(self, name: str, counter: "_CounterMark") -> None:
        began, value = counter.written()
        event = {"ph": "C", "pid": _PROCESS, "ts": self._microseconds(began), "name": name}
        self._write({**event, "args": {"value": value}})

    def _event(self, kind: str, lane: int, at: float, **fields: object) -> Event:
        if not fields.get("args"):
            fields.pop("args", None)
        return {"ph": kind, "pid": _PROCESS, "tid": lane, "ts": self._microseconds(at), **fields}

    def _microseconds(self, at: float) -> int:
        return round(1e6 * (at - self._began))


def read_trace(path: Path | str) -> list[Event]:
    """Return all events of a trace file, of a finished or a killed run.

    An incomplete last line is left out.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a line is not an event, and it is not the last one.
    """
    lines = [line.strip(b" ,\r") for line in Path(path).read_bytes().split(b"\n")]
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line not in _BRACKETS]
    events: list[Event] = []
    for number, line in numbered:
        try:
            event = parse_json(line)
        except ValueError:
            event = None
        if isinstance(event, dict):
            events.append(event)
        elif number != numbered[-1][0]:
            raise DataError(f"{path}:{number}: not a trace event: {line[:80]!r}")
    return events


def set_aside(path: Path) -> list[Path]:
    """The names that earlier traces get when ``path`` is begun anew, the newest first."""
    return [path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, FILES_KEPT)]


_BRACKETS = (b"", b"[", b"]")


class _CounterMark:
    """A counter's current value, its begin, and whether the file has it."""

    def __init__(self, value: float, now: float) -> None:
        self.value = value
        self.is_pending = True
        """The file does not have the value yet."""
        self._since = now
        self._written_at = -math.inf

    def set(self, value: float, now: float) -> None:
        self.value, self._since, self.is_pending = value, now, True

    def is_due(self, now: float) -> bool:
        """Whether the value must be written now: the last one was written long enough ago."""
        return self.is_pending and now - self._written_at >= _COUNTER_INTERVAL_S

    def written(self) -> tuple[float, float]:
        """Mark the value as written; return its begin and the value."""
        self.is_pending, self._written_at = False, self._since
        return self._since, self.value


class _Lanes:
    """Rows of the viewer: as many per track as it has spans open at once.

    Args:
        on_new: is called with the events that name a new row.
    """

    def __init__(self, on_new: Callable[[Event], None]) -> None:
        self._on_new = on_new
        self._tracks: list[str] = list(_TRACKS)
        self._taken: dict[str, list[bool]] = {}

    def first(self, track: str) -> int:
        """The track's first row, free or not."""
        if not self._taken.setdefault(track, []):
            self._add(track)
        return self._number(track, 0)

    def take(self, track: str) -> int:
        """Reserve a row without an open span, a new one if there is none."""
        taken = self._taken.setdefault(track, [])
        index = taken.index(False) if False in taken else self._add(track)
        taken[index] = True
        return self._number(track, index)

    def release(self, track: str, lane: int) -> None:
        self._taken[track][lane % _LANES_PER_TRACK] = False

    def names(self) -> list[Event]:
        """The events that name all rows."""
        return [
            event
            for track, taken in self._taken.items()
            for index in range(len(taken))
            for event in self._naming(track, index)
        ]

    def _add(self, track: str) -> int:
        taken = self._taken[track]
        taken.append(False)
        for event in self._naming(track, len(taken) - 1):
            self._on_new(event)
        return len(taken) - 1

    def _naming(self, track: str, index: int) -> list[Event]:
        lane = self._number(track, index)
        common = {"ph": "M", "pid": _PROCESS, "tid": lane}
        return [
            {**common, "name": "thread_name", "args": {"name": track}},
            {**common, "name": "thread_sort_index", "args": {"sort_index": lane}},
        ]

    def _number(self, track: str, index: int) -> int:
        """The row's number, by which viewers sort: by track, then by row."""
        if track not in self._tracks:
            self._tracks.append(track)
        return _LANES_PER_TRACK * (self._tracks.index(track) + 1) + index


class _TraceFile:
    """A file of one event per line, which the operating system has when `write` returns.

    The comma stands before an event, not after it: a bracket turns whatever a killed run wrote into
    JSON.

    Args:
        head: returns the events that every file begins with.
    """

    def __init__(self, path: Path, limit_bytes: int, head: Callable[[], Iterable[Event]]) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._head = head
        self._fd: int | None = None
        self._size = 0
        self._begin()

    def write(self, event: Event) -> None:
        """Append an event; a full file is renamed first."""
        if self._fd is not None and self._size >= self._limit_bytes:
            self.close()
            self._begin()
        self._append(b",\n" + _encoded(event))

    def close(self) -> None:
        if self._fd is not None:
            self._append(b"\n]\n")
            os.close(self._fd)
            self._fd = None

    def _begin(self) -> None:
        """Rename the earlier files and begin a new one with its head."""
        try:
            self._put_aside()
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unusable(error) from error
        self._size = 0
        self._append(b"[\n" + b",\n".join(_encoded(event) for event in self._head()))

    def _put_aside(self) -> None:
        files = [self._path, *set_aside(self._path)]
        for source, target in reversed(list(pairwise(files))):
            if source.exists():
                source.replace(target)

    def _append(self, content: bytes) -> None:
        assert self._fd is not None
        try:
            written = 0
            while written < len(content):
                written += os.write(self._fd, content[written:])
        except OSError as error:
            # Half an event would make a file that ends here no JSON.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise self._unusable(error) from error
        self._size += written

    def _unusable(self, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"{self._path} cannot be written: {error.strerror or error}; free space, choose "
            "another output_dir, or set logging.trace: false"
        )


def _encoded(event: Event) -> bytes:
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode()
