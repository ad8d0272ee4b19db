"""The engines of a run's fleets and the ranks of its learner: one row each, from the metrics."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from qwen3_distill.recording import text
from qwen3_distill.recording.fleet_rates import MEMBER
from qwen3_distill.report.drawing import Colour
from qwen3_distill.report.run_files import is_number
from qwen3_distill.report.time_section import STAGE_COLOURS

Steps: TypeAlias = Sequence[Mapping[str, Any]]
"""Lines of ``metrics.jsonl``."""

_KINDS = {
    "rollout": ("rollout replica {}", "generate"),
    "teacher": ("teacher {}", "score"),
    "rank": ("rank {} of the learner", "train"),
}
"""By kind of member: its name for people, and the stage that it works for."""
_TOKENS = re.compile(rf"fleet/({MEMBER})_tokens")


@dataclass(frozen=True)
class MemberRow:
    """An engine of a fleet, or a rank; a dash where nothing is known."""

    name: str
    colour: Colour
    rate: str
    """Tokens per second of its work, over all steps."""
    busy: str
    """Share of the steps' time in which it worked."""
    queue: str
    """Tokens that it was given and had not answered: mean over the steps' ends."""
    restarts: str
    lag: str
    """The largest number of steps between the newest version and the one that it had."""


def fleet_table(steps: Steps) -> list[MemberRow]:
    """Return a row per engine and rank: rollouts, teachers, ranks; empty without a cluster."""
    found = {match.groups() for line in steps for key in line if (match := _TOKENS.fullmatch(key))}
    kinds = list(_KINDS)
    ordered = sorted(found, key=lambda member: (kinds.index(member[1]), int(member[2])))
    return [_row(steps, member, kind, number) for member, kind, number in ordered]


def member_colours(members: Sequence[str]) -> dict[str, Colour]:
    """Map tracks of engines and ranks (``rollout_0``) to the colours of their stages."""
    return {
        member: STAGE_COLOURS[_KINDS[kind][1]]
        for member in members
        if (kind := member.rpartition("_")[0]) in _KINDS
    }


def _row(steps: Steps, member: str, kind: str, number: str) -> MemberRow:
    name, stage = _KINDS[kind]
    timed = [line for line in steps if is_number(line.get(f"time/{member}_s"))]
    busy_s = sum(line[f"time/{member}_s"] for line in timed)
    whole_s = sum(line.get("time/step_s") or 0.0 for line in timed)
    tokens = sum(
        line[f"fleet/{member}_tok_s"] * line[f"time/{member}_s"]
        for line in timed
        if is_number(line.get(f"fleet/{member}_tok_s"))
    )
    queue = _values(steps, f"fleet/{member}_queue_tokens")
    restarts = _values(steps, f"fleet/{member}_restarts")
    lag = _values(steps, f"fleet/{member}_lag_steps")
    return MemberRow(
        name=name.format(number),
        colour=STAGE_COLOURS[stage],
        rate=f"{tokens / busy_s:,.0f} tok/s" if busy_s else "-",
        busy=text.percent(busy_s / whole_s) if whole_s else "-",
        queue=text.number(sum(queue) / len(queue)) if queue else "-",
        restarts=text.number(_all_restarts(restarts)) if restarts else "-",
        lag=text.number(max(lag)) if lag else "-",
    )


def _values(steps: Steps, key: str) -> list[float]:
    return [line[key] for line in steps if is_number(line.get(key))]


def _all_restarts(counts: Sequence[float]) -> float:
    """Add up the rises of a count that begins at 0 with every start of the run."""
    before, total = 0.0, 0.0
    for count in counts:
        total += count - before if count >= before else count
        before = count
    return total
