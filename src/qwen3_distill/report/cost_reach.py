"""Computes what a run had cost when its student reached an accuracy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_distill.errors import RunFolderError
from qwen3_distill.recording.cost_records import Amounts, CostPoint, CostTotals, headline
from qwen3_distill.report.run_files import RunFiles

INTERPOLATION = (
    "Between two evaluations, accuracy is taken to rise in a straight line over the cost; nothing "
    "is extrapolated."
)


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """An evaluation of the student, with the cost up to it."""

    step: int
    accuracy: float
    marginal: Amounts
    total: Amounts


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """A run's cost ledger beside its evaluations."""

    name: str
    totals: CostTotals | None
    """None: the run is older than the ledger, or has not begun to train."""
    evaluated: Sequence[Evaluated]
    teacher: float | None
    """The teacher's accuracy."""


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The cost at which a level was reached, or within which it was not."""

    level: float
    accuracy: float | None
    """The accuracy that the level stands for; None where the run does not say it."""
    step: float | None
    """Interpolated; None: not reached."""
    marginal: Amounts
    """Up to the level; where it was not reached, of the whole run."""
    total: Amounts
    why_not: str | None
    """Why the run cannot tell; None where it can, also where the level was not reached."""

    def record(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "accuracy": self.accuracy,
            "reached": self.step is not None,
            "step": self.step,
            "marginal" if self.step is not None else "not_within_marginal": self.marginal,
            "total" if self.step is not None else "not_within_total": self.total,
            **({} if self.why_not is None else {"why_not": self.why_not}),
        }


def read_run_cost(folder: Path, *, at_second: bool = False) -> RunCost:
    """Read the cost and the evaluations of a run, which may be running, killed or finished.

    Args:
        at_second: take the evaluations at the second temperature.

    Raises:
        RunFolderError: the folder holds no run.
        DataError: a file of it is damaged.
    """
    if not (folder / "config.json").is_file():
        raise RunFolderError(
            f"{folder} is not a run folder: it has no config.json; give the output_dir of a run"
        )
    return run_cost(RunFiles.load(folder, with_timeline=False), at_second=at_second)


def run_cost(run: RunFiles, *, at_second: bool = False) -> RunCost:
    """Join a run's evaluations with the cost at their steps."""
    totals = run.cost
    at_step = {} if totals is None else {point.step: point for point in totals.points}
    teacher = run.evaluation("teacher", at_second=at_second)
    return RunCost(
        name=run.name,
        totals=totals,
        evaluated=[
            _evaluated(record, at_step[record["step"]])
            for record in run.student_by_step(at_second=at_second)
            if record["step"] in at_step
        ],
        teacher=None if teacher is None else teacher["accuracy"],
    )


def _evaluated(record: Mapping[str, Any], point: CostPoint) -> Evaluated:
    return Evaluated(
        step=record["step"],
        accuracy=record["accuracy"],
        marginal=point.marginal,
        total=point.total,
    )


def reached(run: RunCost, level: float, *, absolute: bool) -> Reached:
    """Find the first crossing of a level by the student's evaluations.

    Args:
        level: an accuracy, or the share of the gap between the student before and the teacher.
    """
    accuracy, why = _accuracy_of(run, level, absolute=absolute)
    spent = run.totals
    marginal = {} if spent is None else headline(spent.marginal)
    total = {} if spent is None else headline(spent.total)
    if accuracy is not None:
        for index, now in enumerate(run.evaluated):
            if now.accuracy >= accuracy:
                before = run.evaluated[index - 1] if index else now
                return _crossing(level, accuracy, before, now)
    return Reached(
        level=level, accuracy=accuracy, step=None, marginal=marginal, total=total, why_not=why
    )


def _accuracy_of(run: RunCost, level: float, *, absolute: bool) -> tuple[float | None, str | None]:
    """Return the accuracy that a level stands for, or why the run has none."""
    if run.totals is None:
        return None, "no cost ledger"
    if not run.evaluated:
        return None, "the student was not evaluated"
    if absolute:
        return level, None
    if run.evaluated[0].step != 0:
        return None, "no evaluation before training"
    if run.teacher is None:
        return None, "no evaluation of the teacher"
    gap = run.teacher - run.evaluated[0].accuracy
    if gap <= 0:
        return None, "the teacher is no better than the student before training"
    return run.evaluated[0].accuracy + level * gap, None


def _crossing(level: float, accuracy: float, before: Evaluated, now: Evaluated) -> Reached:
    rise = now.accuracy - before.accuracy
    share = (accuracy - before.accuracy) / rise if rise > 0 else 1.0

    def between(low: float, high: float) -> float:
        return low + share * (high - low)

    return Reached(
        level=level,
        accuracy=accuracy,
        step=between(before.step, now.step),
        marginal={k: between(before.marginal.get(k, 0.0), v) for k, v in now.marginal.items()},
        total={k: between(before.total.get(k, 0.0), v) for k, v in now.total.items()},
        why_not=None,
    )
