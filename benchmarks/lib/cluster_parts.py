"""Parts of `speed/cluster.py`: layouts on N cards, the log, the ledger's check and the figures."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.overlap_parts import FEWEST_STEPS, rate_of_common_steps

BASE = "one"
"""The layout that all others are compared with: all three engines on one card, no cluster."""
MEMBER_KINDS = {"rollout": "generate", "teacher": "score", "rank": "train"}


def layout(name: str, cards: int) -> list[str]:
    """Return the overrides of a layout that this benchmark knows.

    ``one``: no cluster. ``each``: all three engines on each card. ``roles``: a card per role; of
    two cards the learner and the teacher share the first.

    Raises:
        ValueError: there is no such layout.
    """
    if name == BASE:
        return ["cluster=null"]
    shared = f"{{replicas: {cards}, where: with_learner}}"
    if name == "each":
        section = f"learner: {{ranks: {cards}}}, rollouts: {shared}, teachers: {shared}"
    elif name == "roles" and cards == 2:
        section = "learner: {}, rollouts: {where: own}, teachers: {where: with_learner}"
    elif name == "roles" and cards > 2:
        own = f"{{replicas: {cards - 2}, where: own}}"
        section = f"learner: {{}}, rollouts: {own}, teachers: {{where: own}}"
    else:
        raise ValueError(
            f"no layout is called {name!r} on {cards} cards: one, each, roles, or --set gives its "
            "cluster section"
        )
    return [f"cluster={{{section}}}"]


def is_base(arm: str) -> bool:
    """Whether an arm is the base, or the base with other settings."""
    return arm.partition("+")[0] == BASE


@dataclass(frozen=True)
class Arm:
    """One layout, whose engines are started once for all of its parts."""

    name: str
    cards: int
    overrides: tuple[str, ...]

    @property
    def is_base(self) -> bool:
        return is_base(self.name)

    @classmethod
    def parse(cls, text: str, cards: int, settings: Sequence[str]) -> "Arm":
        """Parse ``LAYOUT[@CARDS][+LABEL]``.

        Args:
            cards: of the machine.
            settings: ``ARM:KEY=VALUE`` for any arm, which come last.
        """
        name, _, number = text.partition("+")[0].partition("@")
        count = 1 if name == BASE else int(number or cards)
        own = [value for arm, _, value in (s.partition(":") for s in settings) if arm == text]
        known = layout(name, count) if name in (BASE, "each", "roles") else []
        if not known and not own:
            raise ValueError(
                f"arm {text!r} is no known layout, and no --set {text}:... describes it"
            )
        return cls(text, count, (*known, *own))


# --- The log --------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the parts that were measured, the last one of each name; none without a file."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    found = {(part["arm"], part["part"]): part for part in map(json.loads, lines)}
    return list(found.values())


def append_log(path: Path, part: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(part) + "\n")


def done_parts(log: Sequence[Mapping[str, Any]], arm: Arm, common: Sequence[str]) -> set[str]:
    """Return the names of an arm's parts that the log has.

    Raises:
        ValueError: they were measured with other settings.
    """
    parts = [part for part in log if part["arm"] == arm.name]
    for part in parts:
        if part["overrides"] != [*common, *arm.overrides]:
            raise ValueError(
                f"the log has {arm.name}:{part['part']} with other settings; use another --log, or "
                "another name for the arm"
            )
    return {part["part"] for part in parts}


# --- What a part recorded -------------------------------------------------------------------------


def ledger_check(
    ledger: Sequence[Mapping[str, Any]], first: int, drawn: int, outstanding: Sequence[int]
) -> dict[str, int]:
    """Count the rollouts ``first`` .. ``drawn`` - 1 that are nowhere, and those there twice."""
    settled = Counter(
        int(entry.partition(":")[0])
        for line in ledger
        for entry in (*line["trained"].split(), *line["dropped"].split())
    )
    open_numbers = set(outstanding)
    return {
        "rollouts": len(settled),
        "lost": sum(n not in settled and n not in open_numbers for n in range(first, drawn)),
        "duplicated": sum(count - 1 for count in settled.values())
        + len(open_numbers & settled.keys()),
    }


def member_rates(steps: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return per engine and rank its tokens per second at work, and its idle share."""
    whole_s = sum(step["time/step_s"] for step in steps)
    found: dict[str, dict[str, float]] = {}
    for key in steps[-1]:
        member = key.removeprefix("fleet/").removesuffix("_tokens")
        if f"time/{member}_s" not in steps[-1] or key != f"fleet/{member}_tokens":
            continue
        busy = [step.get(f"time/{member}_s") or 0.0 for step in steps]
        rates = [step.get(f"fleet/{member}_tok_s") or 0.0 for step in steps]
        tokens = sum(rate * seconds for rate, seconds in zip(rates, busy, strict=True))
        busy_s = sum(busy)
        found[member] = {
            "tok_s": tokens / busy_s if busy_s else 0.0,
            "tok_s_of_the_run": tokens / whole_s,
            "idle_fraction": 1 - busy_s / whole_s,
        }
    return found


def role_idle(
    members: Mapping[str, Mapping[str, float]], steps: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Return the mean idle share of each stage's engines; the stage's own where it has one only."""
    whole_s = sum(step["time/step_s"] for step in steps)
    busy_s = {
        stage: sum(step.get(f"time/{stage}_s") or 0.0 for step in steps)
        for stage in MEMBER_KINDS.values()
    }
    alone = {stage: 1 - seconds / whole_s for stage, seconds in busy_s.items()}
    found: dict[str, list[float]] = {}
    for member, values in members.items():
        stage = MEMBER_KINDS[member.rpartition("_")[0]]
        found.setdefault(stage, []).append(values["idle_fraction"])
    return alone | {stage: sum(shares) / len(shares) for stage, shares in found.items()}


# --- Figures --------------------------------------------------------------------------------------


def figures_of(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compare all parts of a log with the base's best part of the same lengths."""
    figures: dict[str, float] = {}
    best_of_base: dict[str, Mapping[str, Any]] = {}
    for part in log:
        name = _key(part["part"])
        figures[f"tok_s_{name}_{_key(part['arm'])}"] = part["tok_s"]
        figures[f"peak_gib_{_key(part['arm'])}"] = max(
            figures.get(f"peak_gib_{_key(part['arm'])}", 0.0), max(part["peaks_gib"], default=0.0)
        )
        lengths = part["lengths"]
        if is_base(part["arm"]):
            known = best_of_base.get(lengths)
            if known is None or part["tok_s"] > known["tok_s"]:
                best_of_base[lengths] = part
    most = max((part["cards"] for part in log), default=1)
    best: dict[tuple[str, int], float] = {}
    for part in log:
        base = best_of_base.get(part["lengths"])
        if base is None or is_base(part["arm"]) or part["struck"]:
            continue
        speedup = compared(part, base)
        if speedup is None:
            continue
        figures[f"speedup_{part['lengths']}_{_key(part['arm'])}"] = speedup
        key = (part["lengths"], part["cards"])
        if speedup > best.get(key, 0.0):
            best[key] = speedup
    figures |= _once_a_step([part for part in log if part["cards"] == most])
    for (lengths, cards), speedup in best.items():
        if cards == most:
            figures[f"speedup_{lengths}"] = speedup
        if lengths == "fixed":
            figures[f"speedup_{cards}"] = speedup
            figures[f"efficiency_{cards}"] = speedup / cards
    figures["lost"] = sum(part["ledger"]["lost"] for part in log)
    figures["duplicated"] = sum(part["ledger"]["duplicated"] for part in log)
    struck = [part for part in log if part["struck"]]
    if struck:
        figures["struck_lost"] = sum(part["ledger"]["lost"] for part in struck)
        figures["struck_duplicated"] = sum(part["ledger"]["duplicated"] for part in struck)
        figures["struck_restarts"] = sum(part["restarts"] for part in struck)
        returns = [part["served_again_s"] for part in struck if part["served_again_s"] is not None]
        if returns:
            figures["struck_served_again_s"] = max(returns)
    return figures


def _once_a_step(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what the fastest layout of fixed lengths does once a step."""
    parts = [
        part
        for part in log
        if part["lengths"] == "fixed" and not part["struck"] and not is_base(part["arm"])
    ]
    if not parts:
        return {}
    fastest = max(parts, key=lambda part: part["tok_s"])
    figures = {
        "publish_pct_of_step": 100 * fastest["time/publish_s"] / fastest["time/step_s"],
        "bytes_per_step": fastest["bytes_per_step"]["all"],
    }
    load_s = fastest.get("weights/load_s")
    return figures if load_s is None else figures | {"load_beside_s": load_s}


def compared(part: Mapping[str, Any], base: Mapping[str, Any]) -> float | None:
    """Return a part's speed by the base's, over the same steps where lengths differ by step.

    None with fewer than `FEWEST_STEPS` of them.
    """
    if part["lengths"] == "fixed":  # every step has the same tokens
        enough = min(part["steps"], base["steps"]) >= (1 if base["kind"] == "sequential" else 2)
        return part["tok_s"] / base["tok_s"] if enough else None
    if base["kind"] == part["kind"]:
        return rate_of_common_steps(part, base)
    return part["tok_s"] / base["tok_s"] if base["steps"] >= FEWEST_STEPS else None


def _key(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
