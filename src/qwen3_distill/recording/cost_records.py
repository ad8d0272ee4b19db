"""Reads ``cost.jsonl``, the cost ledger of a run.

The file is never cut. A line holds what was spent since the line before it:

- ``start``: a process begins to train from ``step``. What earlier processes computed after that
  step is lost, and so are their rollouts that no step had used.
- ``step``, ``checkpoint``, ``evaluation``, ``end``: after ``step`` steps.
- ``part``: for a step that is not finished, whose number it has.

So every computation is in exactly one line, and is either kept or lost. No torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from qwen3_distill.errors import DataError
from qwen3_distill.recording.clock import IDLE
from qwen3_distill.recording.jsonl import OCCASIONAL_STAGES, STEP_STAGES, read_jsonl

COST_FILE = "cost.jsonl"
START_UP = "start"
"""Seconds from the start of a process until it trains: models load, engines start."""
ROLES = (*STEP_STAGES, *OCCASIONAL_STAGES, START_UP, IDLE)
"""Purposes that devices are held for, in the order of tables."""

Amounts: TypeAlias = Mapping[str, float]
"""Amounts by ``area/name``: ``tokens/``, ``flops/``, ``bytes/``, ``device_s/``, ``money/``."""


@dataclass(frozen=True, kw_only=True)
class CostPoint:
    """Cost of a run up to the end of a step."""

    step: int
    marginal: Amounts
    total: Amounts


@dataclass(kw_only=True)
class CostTotals:
    """Sums of a cost ledger."""

    kept: dict[str, float] = field(default_factory=dict)
    """Amounts of the steps that made the student, evaluations apart."""
    evaluation: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    """Amounts of steps, rollouts and evaluations that a later start did not go on from."""
    starts: int = 0
    devices: int = 1
    unknown: dict[str, str] = field(default_factory=dict)
    """By model whose FLOPs are not counted: why."""
    points: list[CostPoint] = field(default_factory=list)
    """One per kept step, the start included."""

    @property
    def total(self) -> dict[str, float]:
        """Sum of all amounts that were spent."""
        return added(self.kept, self.evaluation, self.lost)

    @property
    def marginal(self) -> dict[str, float]:
        """Amounts of the kept steps themselves: no evaluation, nothing lost, no idle device."""
        return {
            key: value
            for key, value in self.kept.items()
            if not key.startswith(("device_s/", "money/")) or key.rpartition("/")[2] in STEP_STAGES
        }

    def add(self, work: Amounts, evaluation: Amounts, *, is_kept: bool = True) -> None:
        """Add a line's amounts, priced, to the sums."""
        add_to(self.kept if is_kept else self.lost, work)
        add_to(self.evaluation if is_kept else self.lost, evaluation)

    def record(self) -> dict[str, Any]:
        """Return the sums as JSON values."""
        groups = {
            "marginal": self.marginal,
            "kept": self.kept,
            "evaluation": self.evaluation,
            "lost": self.lost,
            "total": self.total,
        }
        return {
            "devices": self.devices,
            "starts": self.starts,
            **({"flops_not_counted": self.unknown} if self.unknown else {}),
            **{name: nested(amounts) for name, amounts in groups.items()},
        }


def read_cost(folder: Path, *, with_points: bool = False) -> CostTotals | None:
    """Read a run's cost ledger; None where the run has none, being older than it.

    Raises:
        DataError: the file is damaged.
    """
    try:
        records = read_jsonl(folder / COST_FILE)
    except FileNotFoundError:
        return None
    return fold(records, with_points=with_points, name=str(folder / COST_FILE))


def fold(
    records: Sequence[Mapping[str, Any]], *, with_points: bool = False, name: str = COST_FILE
) -> CostTotals:
    """Sum up the lines of a cost ledger.

    Raises:
        DataError: a line has another form.
    """
    totals = CostTotals()
    try:
        unused: Amounts = {}
        price: float | None = None
        currency = ""
        for record, is_kept in zip(records, _surviving(records), strict=True):
            if record["kind"] == "start":
                add_to(totals.lost, unused)
                add_to(totals.kept, {key: -value for key, value in unused.items()})
                unused = {}
                totals.starts += 1
                totals.devices = record["devices"]
                totals.unknown |= record["unknown"]
                price, currency = record["price_per_device_hour"], record["currency"]
            work = priced(_amounts_of(record, "work"), price, currency)
            evaluation = priced(_amounts_of(record, "evaluation"), price, currency)
            totals.add(work, evaluation, is_kept=is_kept)
            if is_kept:
                unused = _amounts_of(record, "unused")
                if with_points and record["kind"] in ("step", "start"):
                    _add_point(totals, record["step"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name} is not a cost ledger: {error!r}; restore the file") from error
    return totals


def _amounts_of(record: Mapping[str, Any], key: str) -> Amounts:
    """Return a line's amounts; raise TypeError for what is no object of numbers."""
    amounts = record[key]
    if not isinstance(amounts, dict) or not all(map(_is_number, amounts.values())):
        raise TypeError(f"{key} is no object of numbers")
    return amounts


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def add_to(sums: dict[str, float], amounts: Amounts) -> None:
    """Add amounts to sums, by key."""
    for key, value in amounts.items():
        sums[key] = sums.get(key, 0) + value


def added(*amounts: Amounts) -> dict[str, float]:
    """Return the sums by key."""
    sums: dict[str, float] = {}
    for part in amounts:
        add_to(sums, part)
    return sums


def area(amounts: Amounts, name: str) -> float:
    """Sum up an area: all ``flops/``, all ``device_s/``."""
    return sum(value for key, value in amounts.items() if key.startswith(f"{name}/"))


def nested(amounts: Amounts) -> dict[str, dict[str, float]]:
    """Return amounts as JSON objects by area."""
    result: dict[str, dict[str, float]] = {}
    for key, value in amounts.items():
        first, _, rest = key.partition("/")
        result.setdefault(first, {})[rest] = value
    return result


def _surviving(records: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each line is of a step that every later start went on from."""
    survives: list[bool] = []
    earliest: float = float("inf")
    for record in reversed(records):
        survives.append(record["step"] <= earliest)
        if record["kind"] == "start":
            earliest = min(earliest, record["step"])
    return survives[::-1]


def priced(amounts: Amounts, price: float | None, currency: str) -> dict[str, float]:
    """Return amounts with the money that their device-seconds cost, by role.

    Args:
        price: of one device for an hour; None: no money is added.
    """
    result = dict(amounts)
    if price is not None:
        for key, seconds in amounts.items():
            if key.startswith("device_s/"):
                role = key.removeprefix("device_s/")
                result[f"money/{currency}/{role}"] = seconds * price / 3600
    return result


def _add_point(totals: CostTotals, step: int) -> None:
    if totals.points and totals.points[-1].step >= step:
        return  # a start goes on from a step that is there
    totals.points.append(
        CostPoint(step=step, marginal=headline(totals.marginal), total=headline(totals.total))
    )


def headline(amounts: Amounts) -> dict[str, float]:
    """Return the sums that costs are compared by: FLOPs, device-seconds, money by currency."""
    sums = {"flops": area(amounts, "flops"), "device_s": area(amounts, "device_s")}
    for key, value in amounts.items():
        if key.startswith("money/"):
            name = f"money_{key.split('/')[1]}"
            sums[name] = sums.get(name, 0.0) + value
    return sums
