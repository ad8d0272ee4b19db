"""Progress of a run on the terminal: a live bar on a TTY, plain lines elsewhere."""

import math
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from typing_extensions import Self

from qwen3_distill.recording.jsonl import STEP_STAGES
from qwen3_distill.recording.terminal import TerminalConsole, for_terminal
from qwen3_distill.recording.text import (
    clock,
    duration,
    percent,
    points,
    quantity,
    temperature_text,
)

_RECENT_STEPS = 20
_FIRST_INTERVAL_S = 5.0
_LONGEST_INTERVAL_S = 60.0


class ProgressReporter(Protocol):
    """Shows the user how a run proceeds. Close it (or use ``with``) before other output."""

    def stage(self, text: str) -> None:
        """Show the current activity, e.g. ``evaluating 320/500``; may be called often."""
        ...

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        """Show that ``step`` is done; ``values`` are its line in ``metrics.jsonl``."""
        ...

    def note(self, text: str) -> None:
        """Show a line that stays: something that the user may want to change."""
        ...

    def evaluation(self, result: Mapping[str, Any]) -> None:
        """Show an evaluation; ``result`` is its line in ``evaluations.jsonl``."""
        ...

    def finish(self, summary: Mapping[str, Any], report_path: Path | None) -> None:
        """Show the end of the run; ``summary`` is the content of ``summary.json``."""
        ...

    def close(self) -> None:
        """Restore the terminal. May be called more than once."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class _Closing:
    """Makes a reporter a context manager that closes it."""

    def close(self) -> None:
        """Restore the terminal."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class SilentReporter(_Closing):
    """A reporter that prints nothing."""

    def stage(self, text: str) -> None: ...

    def step(self, step: int, values: Mapping[str, float | None]) -> None: ...

    def note(self, text: str) -> None: ...

    def evaluation(self, result: Mapping[str, Any]) -> None: ...

    def finish(self, summary: Mapping[str, Any], report_path: Path | None) -> None: ...


def make_reporter(
    total_steps: int, *, start_step: int = 0, console: Console | None = None
) -> ProgressReporter:
    """Return a live display where ``console`` (default: stdout) is a terminal, else plain lines.

    Args:
        total_steps: Steps of the whole run.
        start_step: Steps done before this process started.
    """
    console = console or TerminalConsole(highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal
    return (LiveReporter if live else PlainReporter)(total_steps, start_step, console)


class PlainReporter(_Closing):
    """Prints one line per message and rewrites none: for pipes, files and CI logs.

    Steps are printed every 5 s at first and less often later (at least every 60 s), the first and
    the last step always. So is a stage of which only the numbers change.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        console: Console,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._now = now
        self._pace = Pace(total_steps, start_step, now)
        self._started = now()
        self._last_step_line: float | None = None
        self._last_stage: tuple[str, float] | None = None

    def stage(self, text: str) -> None:
        kind = re.sub(r"[\d.,/%]+", "", text)
        if self._last_stage and self._last_stage[0] == kind and not self._due(self._last_stage[1]):
            return
        self._last_stage = (kind, self._now())
        self._line(text)

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        self._pace.add(step, values)
        self._last_stage = None
        last = self._last_step_line
        if last is None or step >= self._pace.total or self._due(last):
            self._last_step_line = self._now()
            self._line("  ".join(_step_parts(self._pace)))

    def note(self, text: str) -> None:
        self._line(f"note: {text}")

    def evaluation(self, result: Mapping[str, Any]) -> None:
        self._pace.add_evaluation(result)
        self._last_stage = None
        self._line(evaluation_text(result))

    def finish(self, summary: Mapping[str, Any], report_path: Path | None) -> None:
        self.close()
        _print_summary(self._console, summary, report_path)

    def _due(self, last: float) -> bool:
        age = self._now() - self._started
        return self._now() - last >= min(_LONGEST_INTERVAL_S, max(_FIRST_INTERVAL_S, age / 20))

    def _line(self, text: str) -> None:
        text = for_terminal(text)
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveReporter(_Closing):
    """A progress bar that stays at the bottom of the terminal."""

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        console: Console,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._pace = Pace(total_steps, start_step, now)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def stage(self, text: str) -> None:
        # Before the first step there is nothing to count, and a bar without a total pulses.
        self._show(text, "", total=None if self._pace.step is None else self._pace.total)

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        self._pace.add(step, values)
        # No description: on 80 columns the numbers leave room for little more than the bar.
        self._show("", "  ".join(_step_parts(self._pace)), total=self._pace.total)

    def note(self, text: str) -> None:
        text = for_terminal(f"note: {text}")
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def evaluation(self, result: Mapping[str, Any]) -> None:
        self._pace.add_evaluation(result)
        text = for_terminal(evaluation_text(result))
        self._console.print(text, markup=False, highlight=False)

    def finish(self, summary: Mapping[str, Any], report_path: Path | None) -> None:
        self.close()
        _print_summary(self._console, summary, report_path)

    def close(self) -> None:
        self._progress.stop()

    def _show(self, text: str, numbers: str, total: int | None) -> None:
        text = for_terminal(text)
        if self._task is None:
            self._task = self._progress.add_task(text, total=total, numbers=numbers)
            self._progress.start()
        done = self._pace.step or 0
        self._progress.update(
            self._task, description=text, total=total, completed=done, numbers=numbers
        )


class Pace:
    """Progress and speed of the run, and the latest numbers worth showing."""

    def __init__(self, total: int, start_step: int, now: Callable[[], float]) -> None:
        self.total = total
        self.step: int | None = None
        self.reverse_kl: float | None = None
        self.accuracy: tuple[str, float, int | None] | None = None  # of which step, if evaluated
        self._start_step = start_step
        self._now = now
        self._since = now()
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT_STEPS)  # seconds, tokens
        self._measured = False

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        stages = [values.get(f"time/{stage}_s") or 0.0 for stage in STEP_STAGES]
        if self.step is None:
            # Loading and the first evaluation are over; later steps do not have them.
            self._since = self._now() - sum(stages)
            self._start_step = step - 1  # a resumed run's earlier steps took none of this time
        self.step = step
        step_s = values.get("time/step_s")
        # Overlapping stages take no longer than their step.
        taken_s = sum(stages) if step_s is None else min(sum(stages), step_s)
        self._recent.append((taken_s, values.get("tokens/generated") or 0.0))
        self.reverse_kl = _known(values.get("loss/reverse_kl_nats"), self.reverse_kl)
        rollouts = _known(values.get("rollout/accuracy"), None)
        if rollouts is not None and not self._measured:
            self.accuracy = ("rollout acc", rollouts, None)

    def add_evaluation(self, result: Mapping[str, Any]) -> None:
        if result["model"] == "student":
            self.accuracy = ("acc", result["accuracy"], result["step"])
            self._measured = True

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the last steps: generate, score, train and publish."""
        total = sum(seconds for seconds, _ in self._recent)
        return total / len(self._recent) if total else None

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens over the same time as `seconds_per_step`."""
        total = sum(seconds for seconds, _ in self._recent)
        return sum(tokens for _, tokens in self._recent) / total if total else None

    @property
    def remaining_s(self) -> float | None:
        """Estimate from the time of all steps so far, evaluations and checkpoints included."""
        if self.step is None or self.step <= self._start_step:
            return None
        per_step = (self._now() - self._since) / (self.step - self._start_step)
        return per_step * max(0, self.total - self.step)


def _known(value: float | None, otherwise: float | None) -> float | None:
    return otherwise if value is None or not math.isfinite(value) else value


def _step_parts(pace: Pace) -> list[str]:
    width = len(str(pace.total))
    parts = [f"step {pace.step or 0:>{width}}/{pace.total}"]
    if pace.reverse_kl is not None:
        parts.append(f"kl {pace.reverse_kl:.3f}")
    if pace.accuracy is not None:
        name, accuracy, step = pace.accuracy
        of_step = "" if step in (None, pace.step) else f" at step {step}"  # not of these weights
        parts.append(f"{name} {percent(accuracy)}{of_step}")
    if (rate := pace.tokens_per_second) is not None:
        parts.append(f"{rate:,.0f} tok/s")
    if (seconds := pace.seconds_per_step) is not None:
        parts.append(f"{seconds:.2f} s/step")
    if (remaining := pace.remaining_s) is not None:
        parts.append(f"ETA {clock(remaining)}")
    return parts


def evaluation_text(result: Mapping[str, Any]) -> str:
    interval = f"[{points(result['ci_low'])}, {points(result['ci_high'])}]"
    is_teacher = result["model"].startswith("teacher")
    who = "teacher" if is_teacher else f"student at step {result['step']}"
    if "temperature" in result:
        who += f", {temperature_text(result['temperature'])}"
    samples = result.get("samples_per_problem", 1)
    each = f" x {samples} samples" if samples != 1 else ""
    return (
        f"evaluation: {who}  {percent(result['accuracy'])} {interval}  "
        f"{result['num_problems']:,} problems{each}  {duration(result['wall_s'])}"
    )


def _print_summary(console: Console, summary: Mapping[str, Any], report: Path | None) -> None:
    console.print()
    accuracy = summary.get("accuracy") or {}
    if any(accuracy.values()):
        console.print(_accuracy_table(accuracy, summary.get("second_accuracy")))
    wall_s = summary["wall_s"]
    console.print(_time_table(wall_s))
    if sum(wall_s.values()) > 2.05 * wall_s["total"]:
        console.print("stages ran side by side", markup=False, highlight=False)
    tokens = summary.get("tokens", {})
    counts = ", ".join(f"{quantity(count)} {name}" for name, count in tokens.items())
    line = for_terminal(f"{summary['steps']:,} steps; tokens: {counts or 'not counted'}")
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    if report is None:
        return
    student = report.parent / "student"
    written = [f"student: {student}"] if student.is_dir() else []
    for line in (*written, f"report: {report}"):
        console.print(for_terminal(line), markup=False, highlight=False, soft_wrap=True)


def _accuracy_table(accuracy: Mapping[str, Any], second: Mapping[str, Any] | None) -> Table:
    table = Table("held-out", box=box.SIMPLE_HEAD)
    table.add_column("accuracy", justify="right")
    table.add_column("95% interval", justify="right")
    rows = (("student before", "before"), ("student after", "after"), ("teacher", "teacher"))
    for values in (accuracy, second or {}):
        at = f", {temperature_text(values['temperature'])}" if "temperature" in values else ""
        for name, key in rows:
            if value := values.get(key):
                interval = f"{points(value['ci_low'])} to {percent(value['ci_high'])}"
                table.add_row(name + at, percent(value["value"]), interval)
    return table


def _time_table(wall_s: Mapping[str, float]) -> Table:
    total = wall_s["total"]
    table = Table("wall time", box=box.SIMPLE_HEAD)
    table.add_column("time", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in wall_s.items():
        if name != "total":
            share = percent(seconds / total) if total else ""
            table.add_row(for_terminal(name), duration(seconds), share)
    table.add_section()
    table.add_row("total", duration(total), "")
    return table
