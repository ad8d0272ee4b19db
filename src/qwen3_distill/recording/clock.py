"""The run's clock: how long each stage was busy and how long queues were, per step.

The ``time/``, ``idle/`` and ``queue/`` metrics of a step come from here. Callers pass in every
moment, so that the trace can write the same ones (`recording.trace`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from qwen3_distill.recording.jsonl import OCCASIONAL_STAGES, STEP_STAGES
from qwen3_distill.types import Metric

IDLE = "idle"
"""In `StepClock.shares`: the time in which no stage was at work."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """The time of one step, by stage, and its queues."""

    wall_s: float
    busy_s: Mapping[str, float]
    """By stage, and by engine of a fleet: seconds with at least one span open. Stages that overlap
    add up to more than ``wall_s``."""
    any_busy_s: float
    """Seconds with a span of any stage open."""
    counters: Mapping[str, tuple[float, float]]
    """By counter: its mean over time and its largest value."""

    @property
    def idle_fractions(self) -> dict[str, float]:
        """Share of the step in which each stage was idle, and in which all were (``all``).

        Stages that only some steps have are left out: nothing waits for them.
        """
        busy = {s: t for s, t in self.busy_s.items() if s not in OCCASIONAL_STAGES}
        return {
            stage: 1.0 - seconds / self.wall_s if self.wall_s else 0.0
            for stage, seconds in (busy | {"all": self.any_busy_s}).items()
        }

    def metrics(self) -> list[Metric]:
        times = [Metric.sum(f"time/{stage}_s", s) for stage, s in self.busy_s.items()]
        idle = [
            Metric.mean(f"idle/{stage}_fraction", share * self.wall_s, self.wall_s)
            for stage, share in self.idle_fractions.items()
        ]
        queues = [
            metric
            for name, (mean, largest) in self.counters.items()
            for metric in (
                Metric.mean(f"queue/{name}_mean", mean * self.wall_s, self.wall_s),
                Metric.max(f"queue/{name}_max", largest),
            )
        ]
        return [Metric.sum("time/step_s", self.wall_s), *times, *idle, *queues]


class StepClock:
    """Sums spans of the stages and values of the counters, step by step.

    All moments are seconds of one clock that never goes back.

    Args:
        now: the moment at which the first step begins.
    """

    def __init__(self, now: float) -> None:
        self._step_began = now
        self._stages = {stage: _Busy() for stage in (*STEP_STAGES, *OCCASIONAL_STAGES)}
        self._members: dict[str, _Busy] = {}
        self._any_stage = _Busy()
        self._shares = _Shares(now)
        self._counters: dict[str, _Counter] = {}

    @property
    def step_began(self) -> float:
        """The moment at which the current step began."""
        return self._step_began

    def enter(self, stage: str, now: float) -> None:
        """Open a span of the stage. Spans of one stage may overlap."""
        self._stages.setdefault(stage, _Busy()).enter(now)
        self._any_stage.enter(now)
        self._shares.change(stage, 1, now)

    def leave(self, stage: str, now: float) -> None:
        """Close a span of the stage."""
        self._stages[stage].leave(now)
        self._any_stage.leave(now)
        self._shares.change(stage, -1, now)

    def add_member(self, member: str) -> None:
        """Add an engine of a fleet, whose seconds and idle share every step has from now on."""
        self._members.setdefault(member, _Busy())

    def enter_member(self, member: str, now: float) -> None:
        """Open a span of a fleet's engine.

        It works for a stage whose span is open, too, so it counts neither as a stage of its own in
        `shares` nor as work of any stage.
        """
        self._members.setdefault(member, _Busy()).enter(now)

    def leave_member(self, member: str, now: float) -> None:
        """Close a span of a fleet's engine."""
        self._members[member].leave(now)

    def count(self, name: str, value: float, now: float) -> None:
        """Set a counter to a value."""
        counter = self._counters.get(name)
        if counter is None:
            self._counters[name] = _Counter(value, now)
        elif value != counter.value:
            counter.set(value, now)

    def busy_seconds(self, stage: str, now: float) -> float:
        """Seconds so far in which the stage had at least one span open."""
        busy = self._stages.get(stage)
        return 0.0 if busy is None else busy.seconds(now)

    def shares(self, now: float) -> dict[str, float]:
        """Seconds so far by stage and `IDLE`, which add up to the time since the clock began.

        Where stages overlap, each of those at work gets an equal share of the time.
        """
        return self._shares.seconds(now)

    def take_step(self, now: float) -> StepTimes:
        """End the step, return its times, and begin the next one."""
        wall_s, self._step_began = now - self._step_began, now
        return StepTimes(
            wall_s=wall_s,
            busy_s={name: busy.take(now) for name, busy in (self._stages | self._members).items()},
            any_busy_s=self._any_stage.take(now),
            counters={name: counter.take(now) for name, counter in self._counters.items()},
        )


class _Busy:
    """Seconds in which at least one span was open."""

    def __init__(self) -> None:
        self._open = 0
        self._since = 0.0
        self._closed_s = 0.0
        self._taken_s = 0.0

    def enter(self, now: float) -> None:
        if self._open == 0:
            self._since = now
        self._open += 1

    def leave(self, now: float) -> None:
        self._open -= 1
        if self._open == 0:
            self._closed_s += now - self._since

    def seconds(self, now: float) -> float:
        return self._closed_s + (now - self._since if self._open else 0.0)

    def take(self, now: float) -> float:
        """Busy seconds since the last call."""
        total = self.seconds(now)
        taken, self._taken_s = total - self._taken_s, total
        return taken


class _Shares:
    """Divides time equally among the stages that are at work."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._open: dict[str, int] = {}
        self._seconds: dict[str, float] = {}

    def change(self, stage: str, spans: int, now: float) -> None:
        """Note that a stage has one span more or fewer."""
        self._divide(now)
        count = self._open.get(stage, 0) + spans
        if count > 0:
            self._open[stage] = count
        else:
            self._open.pop(stage, None)

    def seconds(self, now: float) -> dict[str, float]:
        self._divide(now)
        return dict(self._seconds)

    def _divide(self, now: float) -> None:
        passed, self._since = now - self._since, now
        at_work = list(self._open) or [IDLE]
        for stage in at_work:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + passed / len(at_work)


class _Counter:
    """A value over time: its mean and its largest."""

    def __init__(self, value: float, now: float) -> None:
        self.value = value
        self._largest = value
        self._area = 0.0
        self._counted_to = self._taken_at = now

    def set(self, value: float, now: float) -> None:
        self._count(now)
        self.value = value
        self._largest = max(self._largest, value)

    def take(self, now: float) -> tuple[float, float]:
        """Mean over time and largest value since the last call."""
        self._count(now)
        span_s = now - self._taken_at
        mean = self._area / span_s if span_s else self.value
        largest = self._largest
        self._area, self._taken_at, self._largest = 0.0, now, self.value
        return mean, largest

    def _count(self, now: float) -> None:
        self._area += self.value * (now - self._counted_to)
        self._counted_to = now
