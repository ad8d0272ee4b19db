"""Lays costs out as rows: of one run for the report, of several side by side for the command."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qwen3_distill.recording import text
from qwen3_distill.recording.cost_records import (
    ROLES,
    Amounts,
    CostTotals,
    headline,
)
from qwen3_distill.report.cost_reach import Reached

NO_LEDGER = "no cost ledger (made by an older version, or not begun)"

_TOKENS = (
    ("sampled by the student", ("sampled_student",)),
    ("sampled by the teacher", ("sampled_teacher",)),
    ("prompts read for sampling", ("prompt_student", "prompt_teacher")),
    ("scored, prompts included", ("scored",)),
    ("of these, from the engine's cache", ("score_cached",)),
    ("of these, from kept scores", ("score_stored",)),
    ("trained on, prompts included", ("trained",)),
    ("padding of training", ("padding",)),
)
_FLOPS = (
    ("sampling", ("sample_student", "sample_teacher")),
    ("scoring", ("score",)),
    ("training", ("train",)),
    ("padding", ("padding",)),
)
_BYTES = (
    ("weights published", ("weights",)),
    ("scores received", ("scores",)),
    ("teacher's top k received", ("top_k",)),
    ("hidden states received", ("hidden_states",)),
)
_PREFIXES = (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


@dataclass(frozen=True)
class CostRow:
    """A quantity and its value in each run; None where a run has no ledger."""

    group: str
    name: str
    values: Sequence[str | None]
    is_sum: bool = False


def cost_rows(runs: Sequence[CostTotals | None]) -> list[CostRow]:
    """Return the rows that at least one of the runs has an amount for."""
    kept = [None if run is None else run.kept for run in runs]
    total = [None if run is None else run.total for run in runs]
    marginal = [None if run is None else headline(run.marginal) for run in runs]
    whole = [None if run is None else headline(run.total) for run in runs]
    evaluation = [None if run is None else headline(run.evaluation) for run in runs]
    lost = [None if run is None else headline(run.lost) for run in runs]
    rows = [
        *_named("tokens", "tokens", _TOKENS, kept, text.quantity),
        *_named("tokens by tag", "by_tag", _tag_names(kept), kept, text.quantity),
        *_named("FLOPs", "flops", _FLOPS, kept, si),
        _row("FLOPs", "marginal: the steps kept", [_at(m, "flops") for m in marginal], si),
        _row("FLOPs", "evaluations", [_at(m, "flops") for m in evaluation], si),
        _row("FLOPs", "lost to crashes and stops", [_at(m, "flops") for m in lost], si),
        _row("FLOPs", "total", [_at(m, "flops") for m in whole], si, is_sum=True),
        *_named(
            "device time",
            "device_s",
            [(_ROLE_NAMES.get(role, role), (role,)) for role in ROLES],
            total,
            text.duration,
        ),
        _time("marginal: generate, score, train, publish", marginal),
        _time("of the total, in lost steps", lost),
        _time("total", whole, is_sum=True),
        *_named("bytes", "bytes", _BYTES, kept, _bytes),
        *_money(marginal, whole),
    ]
    return [row for row in rows if row.is_sum or any(v not in (None, "0") for v in row.values)]


_BY_TAG = {"scored": "scored, prompts included,", "sampled": "sampled"}


def _tag_names(runs: Sequence[Amounts | None]) -> list[tuple[str, tuple[str, ...]]]:
    """Rows of the tags' amounts, where every tag has a teacher of its own."""
    keys = sorted({key for run in runs if run for key in run if key.startswith("by_tag/")})
    names = [key.removeprefix("by_tag/") for key in keys]
    return [(" of ".join(_what_and_tag(name)), (name,)) for name in names]


def _what_and_tag(name: str) -> tuple[str, str]:
    for what, shown_as in _BY_TAG.items():
        if name.endswith(f"_{what}_tokens"):
            return shown_as, name.removesuffix(f"_{what}_tokens")
    return "amount", name  # of a ledger that was changed


_ROLE_NAMES = {"start": "start-up", "idle": "idle: no stage at work"}


def reach_text(found: Reached) -> str:
    """Return a line's cell: the marginal and the total cost, or why there is none."""
    if found.why_not is not None:
        return found.why_not
    if found.step is None:
        return f"not reached within {_costs(found.marginal)} (total {_costs(found.total)})"
    return f"{_costs(found.marginal)} (total {_costs(found.total)}), step {found.step:,.1f}"


def si(value: float, unit: str = "") -> str:
    """``1234567`` as ``1.23 M``, up to zetta (10^21), with a unit as ``1.23 MB``."""
    for prefix, size in _PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def _costs(amounts: Amounts) -> str:
    if not amounts:
        return ""
    parts = [si(amounts["flops"], "FLOP"), text.duration(amounts["device_s"])]
    money = [key for key in amounts if key.startswith("money_")]
    parts += [f"{_amount(amounts[key])} {key.removeprefix('money_')}" for key in money]
    return ", ".join(parts)


def _named(
    group: str,
    area_name: str,
    names: Iterable[tuple[str, Sequence[str]]],
    runs: Sequence[Amounts | None],
    show: Callable[[float], str],
) -> list[CostRow]:
    rows = []
    for name, keys in names:
        values = [
            None if run is None else sum(run.get(f"{area_name}/{key}", 0) for key in keys)
            for run in runs
        ]
        rows.append(_row(group, name, values, show))
    return rows


def _row(
    group: str,
    name: str,
    values: Sequence[float | None],
    show: Callable[[float], str],
    *,
    is_sum: bool = False,
) -> CostRow:
    shown = [None if value is None else show(value) if value else "0" for value in values]
    return CostRow(group, name, shown, is_sum)


def _time(name: str, runs: Sequence[Amounts | None], *, is_sum: bool = False) -> CostRow:
    values = [_at(run, "device_s") for run in runs]
    return _row("device time", name, values, text.duration, is_sum=is_sum)


def _money(
    marginal: Sequence[Mapping[str, float] | None], whole: Sequence[Mapping[str, float] | None]
) -> list[CostRow]:
    keys = sorted({key for run in whole if run for key in run if key.startswith("money_")})
    rows = []
    for key in keys:
        unit = key.removeprefix("money_")
        for name, runs in ((f"marginal, {unit}", marginal), (f"total, {unit}", whole)):
            rows.append(_row("money", name, [_at(run, key) for run in runs], _amount))
    return rows


def _at(amounts: Mapping[str, float] | None, key: str) -> float | None:
    return None if amounts is None else amounts.get(key, 0.0)


def _amount(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def _bytes(count: float) -> str:
    return si(count, "B")
