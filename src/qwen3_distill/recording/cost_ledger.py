"""Writes ``cost.jsonl``, the cost ledger of a run; its form is in `cost_records`."""

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal

from qwen3_distill.config import CostConfig
from qwen3_distill.recording.cost_records import (
    START_UP,
    Amounts,
    CostTotals,
    add_to,
    added,
    area,
    fold,
    priced,
)
from qwen3_distill.recording.jsonl import JsonlLog, read_jsonl

PART_INTERVAL_S = 10.0
"""Age of the last line at which the next amount writes one: what a kill loses unrecorded."""

Kind = Literal["step", "checkpoint", "evaluation", "end"]


class CostLedger:
    """Gathers what a run spends, and writes it after every step, and in between.

    Device-seconds are the time of the process times its devices. They are divided among the stages
    at work, so that the roles add up to what was held.

    Args:
        path: the file; made at the first `begin`.
        began: when the process began to hold its devices, on ``now``'s clock.
        unknown: by model whose FLOPs are not counted, why.
        now: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        path: Path,
        config: CostConfig,
        *,
        began: float,
        unknown: Mapping[str, str],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._path, self._config, self._now = path, config, now
        self._unknown = dict(unknown)
        self._held_to = began
        """Up to when the devices' time is in `_work`."""
        self._log: JsonlLog | None = None
        self._shares: Callable[[], Mapping[str, float]] = dict
        self._shares_taken: Mapping[str, float] = {}
        self._step = 0
        self._work: dict[str, float] = {}
        self._evaluation: dict[str, float] = {}
        self._unused: dict[str, Amounts] = {}
        """By rollout that ended and that no step has used: what it took."""
        self._written_at = began
        self._collects = False
        """Whether what ends now is kept in files of its own, ahead of any step."""
        self.totals = CostTotals()
        """Sums of all lines so far."""

    def begin(self, step: int, shares: Callable[[], Mapping[str, float]]) -> None:
        """Begin to train from ``step``: what earlier processes computed after it is lost.

        Args:
            shares: returns the seconds since its first call by stage, as `Trace.shares` does.

        Raises:
            RunFolderError: the file cannot be written.
            DataError: the file is damaged.
        """
        self._log = JsonlLog(self._path)
        self._shares, self._shares_taken = shares, shares()
        now = self._now()
        self._work = {f"device_s/{START_UP}": self._devices * (now - self._held_to)}
        self._evaluation, self._unused = {}, {}
        self._held_to, self._step = now, step
        self._write(
            "start",
            step,
            devices=self._devices,
            price_per_device_hour=self._config.price_per_device_hour,
            currency=self._config.currency,
            unknown=self._unknown,
        )
        self.totals = fold(read_jsonl(self._path), name=str(self._path))

    def add(self, amounts: Amounts, *, evaluates: bool = False, rollout_id: str = "") -> None:
        """Add what was just computed.

        Args:
            evaluates: for an evaluation.
            rollout_id: the rollout that it made or scored; it is lost if no step uses the rollout
                before the process ends.
        """
        add_to(self._evaluation if evaluates else self._work, amounts)
        if rollout_id:
            self._unused[rollout_id] = added(self._unused.get(rollout_id, {}), amounts)
        if self._log is not None and self._now() - self._written_at >= PART_INTERVAL_S:
            self._take_time()
            self._write("part", self._part_step)

    def collect(self, rollout_ids: Collection[str], *, ends: bool) -> None:
        """Note rollouts that files keep ahead of any step: no later start makes them again.

        Args:
            ends: whether these were the last ones.
        """
        self._collects = not ends
        self._unused = {key: self._unused[key] for key in self._unused.keys() - set(rollout_ids)}
        self.write("checkpoint")

    def end_step(self, step: int, outstanding: Collection[str]) -> None:
        """Write the line of a step.

        Args:
            outstanding: ids of the rollouts that no step has used or dropped.
        """
        self._step = step
        self._unused = {key: self._unused[key] for key in self._unused.keys() & set(outstanding)}
        self.write("step")

    def write(self, kind: Kind) -> None:
        """Write what was spent since the last line, after the last step's end."""
        self._take_time()
        self._write(kind, self._step)

    def close(self) -> None:
        """Write what a step that was not finished has spent. May be called more than once."""
        if self._log is not None:
            self._take_time()
            self._write("part", self._part_step)
            self._log.close()
            self._log = None

    def metrics(self) -> dict[str, float]:
        """Return the totals so far, as metrics of a step."""
        kept, total = self.totals.kept, self.totals.total
        found = {
            "cost/sampled_tokens": kept.get("tokens/sampled_student", 0)
            + kept.get("tokens/sampled_teacher", 0),
            "cost/scored_tokens": kept.get("tokens/scored", 0),
            "cost/trained_tokens": kept.get("tokens/trained", 0),
            "cost/flops": float(area(kept, "flops")),
            "cost/device_s": area(total, "device_s"),
        }
        if self._config.price_per_device_hour is not None:
            found["cost/money"] = area(total, f"money/{self._config.currency}")
        return found

    @property
    def _part_step(self) -> int:
        """The step of a line in between: of a step that may be lost, unless files keep it."""
        return self._step if self._collects else self._step + 1

    @property
    def _devices(self) -> int:
        return self._config.devices

    def _take_time(self) -> None:
        """Add the devices' time since the last line."""
        shares, self._held_to = self._shares(), self._now()
        for stage, seconds in shares.items():
            passed = self._devices * (seconds - self._shares_taken.get(stage, 0.0))
            group = self._evaluation if stage == "evaluate" else self._work
            if passed:
                add_to(group, {f"device_s/{stage}": passed})
        self._shares_taken = shares

    def _write(self, kind: str, step: int, **more: object) -> None:
        assert self._log is not None, "begin comes first"
        line = {
            "step": step,
            "kind": kind,
            "time": round(time.time(), 3),
            "work": dict(self._work),
            "evaluation": dict(self._evaluation),
            "unused": dict(added(*self._unused.values())),
        }
        self._log.append(line | more)
        price, currency = self._config.price_per_device_hour, self._config.currency
        self.totals.add(
            priced(self._work, price, currency), priced(self._evaluation, price, currency)
        )
        self._work, self._evaluation = {}, {}
        self._written_at = self._now()
