"""Holds one measured time beside what the time plan predicts for it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.modeling.shapes import named_shape
from qwen3_distill.planning.peaks import named_device
from qwen3_distill.planning.rates import EFFICIENCY, Efficiency, peak_rates
from qwen3_distill.planning.time_plan import Planned, TimePlan, assumed_lengths, plan_time

CONFIG = Path(__file__).parents[2] / "configs" / "h200.yaml"
SAMPLED = "{kind: sampled_reverse_kl}"
TOP_16 = "{kind: top_k, k: 16}"


@cache
def _config(overrides: tuple[str, ...]) -> RunConfig:
    return load_config(CONFIG, overrides)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Work that was measured: the config's changes, lengths, models and the card."""

    overrides: Sequence[str] = ()
    prompt_tokens: int = 128
    response_tokens: int = 512
    tail: float = 1.0
    max_new_tokens: int = 512
    teacher: str = "8B"
    student: str = "4B"
    recomputed_layers: int = 0
    device: str = "h200"
    objective: str = SAMPLED

    def config(self) -> RunConfig:
        """Return the run that was measured."""
        given = (
            f"sampling.max_new_tokens={self.max_new_tokens}",
            "evaluation=null",
            f"objective={self.objective}",
        )
        return _config((*given, *self.overrides))

    def plan(self, share: Efficiency = EFFICIENCY) -> TimePlan:
        """Predict it."""
        config = self.config()
        planned = Planned(
            config=config,
            student=named_shape(self.student),
            teacher=named_shape(self.teacher),
            recomputed_layers=self.recomputed_layers,
        )
        assumed = assumed_lengths(
            config,
            prompt_tokens=self.prompt_tokens,
            response_tokens=self.response_tokens,
            tail=self.tail,
        )
        return plan_time(planned, peak_rates(named_device(self.device)), assumed, share)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured time beside its prediction."""

    name: str
    source: str
    """The result's file, without its ending."""
    what: str
    """A stage, ``step``, or ``step without host`` where what was measured ends with its stages."""
    measured_s: float
    case: Case
    fits: str | None = None
    """The share that it fitted; None: it was held out."""
    changed: str | None = None
    """Later change of the software that is known to change this time; None: none is."""

    def predicted_s(self, share: Efficiency = EFFICIENCY) -> float:
        """Return the plan's seconds."""
        plan = self.case.plan(share)
        if self.what == "step":
            return plan.step_s
        if self.what == "step without host":
            return plan.step_s - plan.stages["host"].seconds
        return plan.stages[self.what].seconds  # type: ignore[index]

    def error(self, share: Efficiency = EFFICIENCY) -> float:
        """Return (predicted - measured) / measured."""
        return self.predicted_s(share) / self.measured_s - 1

    def as_record(self) -> dict[str, Any]:
        """Return the row for a result file."""
        record = {
            "row": self.name,
            "source": self.source,
            "what": self.what,
            "measured_s": round(self.measured_s, 4),
            "predicted_s": round(self.predicted_s(), 4),
            "error_pct": round(100 * self.error(), 1),
        }
        given = {"fitted": self.fits, "changed_since": self.changed}
        return record | {key: value for key, value in given.items() if value is not None}


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Read a committed result."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
