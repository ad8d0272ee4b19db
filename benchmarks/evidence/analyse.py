"""Turns the runs' log into figures: what each arm costs to each part of the gap, and the ratios.

    python -m benchmarks.evidence.analyse --log runs/evidence/runs.jsonl

Writes `benchmarks/results/evidence.json`: flat figures, a table per setting, the curves of all
runs, the tuning trials. The rules are those of docs/evidence/protocol.md. A cost that was not
reached within the budget is the budget, and every figure that it enters has `_bound`: 1 for a lower
bound, -1 for an upper one.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from benchmarks.evidence.projection import PAIRS, projected_s, stage_rates
from benchmarks.evidence.settings import MODELS, SETTINGS
from benchmarks.evidence.warm_start import warm_start_flops
from benchmarks.lib.common import RESULTS, write_result
from qwen3_distill.errors import DataError
from qwen3_distill.recording.jsonl import read_jsonl

Point: TypeAlias = Mapping[str, Any]
Cost: TypeAlias = Callable[[Point], float]
Decoding: TypeAlias = Literal["greedy", "sampled"]

LEVELS = (50, 80, 95)
DECODINGS: tuple[Decoding, ...] = ("greedy", "sampled")
TEMPERATURE = {"greedy": "temperature_0", "sampled": "temperature_1"}
SFT_ARMS = ("sft_hard", "sft_hard_epochs", "sft_soft")
OPD_ARMS = (
    *("opd_sampled", "opd_topk16", "opd_full_reverse", "opd_full_forward"),
    *("opd_prefix", "offline_opd", "mixture"),
)
PRIMARY = ("sft_hard", "opd_topk16")
COMPARED = {
    "sampled_to_topk16": ("opd_sampled", "opd_topk16"),
    "full_to_topk16": ("opd_full_reverse", "opd_topk16"),
    "forward_to_topk16": ("opd_full_forward", "opd_topk16"),
    "prefix_to_topk16": ("opd_prefix", "opd_topk16"),
    "offline_to_topk16": ("offline_opd", "opd_topk16"),
    "mixture_to_topk16": ("mixture", "opd_topk16"),
    "weak_teacher_to_topk16": ("weak_teacher", "opd_topk16"),
    "grpo_to_topk16": ("grpo", "opd_topk16"),
    "soft_to_hard": ("sft_soft", "sft_hard"),
    "epochs_to_hard": ("sft_hard_epochs", "sft_hard"),
}
"""Further pairs, by the name of their ratio: choices within a side."""
CLAIMED = 90
"""The ratio that was promised when this project began."""
_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Reached:
    """A run's cost to a level; if not ``within``, its whole budget."""

    cost: float
    within: bool


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Mean cost of one arm over that of another, with its bootstrap interval."""

    value: float
    low: float
    high: float
    bound: int
    """0: both reached the level in every seed; 1: a lower bound; -1: an upper bound."""


def reached(curve: Sequence[Point], before: float, level: float, key: str, cost: Cost) -> Reached:
    """Find the cost at which a curve first reaches an accuracy, linear between evaluations.

    Args:
        before: accuracy at no cost.
    """
    last_cost, last_accuracy = 0.0, before
    if before >= level:
        return Reached(cost=0.0, within=True)
    for point in curve:
        now, accuracy = cost(point), point[key]
        if accuracy >= level:
            share = (level - last_accuracy) / (accuracy - last_accuracy)
            return Reached(cost=last_cost + share * (now - last_cost), within=True)
        last_cost, last_accuracy = now, accuracy
    return Reached(cost=last_cost, within=False)


def ratio_of(above: Sequence[Reached], below: Sequence[Reached]) -> Ratio | None:
    """Mean cost of ``above`` over that of ``below``, resampled over seeds; None if it bounds
    nothing: both sides missed the level somewhere, or the lower costs nothing."""
    missed_above = not all(each.within for each in above)
    missed_below = not all(each.within for each in below)
    costs_above = np.array([each.cost for each in above])
    costs_below = np.array([each.cost for each in below])
    if (missed_above and missed_below) or costs_below.mean() <= 0:
        return None
    rng = np.random.default_rng(0)
    drawn_above = rng.choice(costs_above, (_RESAMPLES, len(costs_above))).mean(axis=1)
    drawn_below = rng.choice(costs_below, (_RESAMPLES, len(costs_below))).mean(axis=1)
    low, high = np.quantile(drawn_above / drawn_below, [0.025, 0.975])
    return Ratio(
        value=float(costs_above.mean() / costs_below.mean()),
        low=float(low),
        high=float(high),
        bound=1 if missed_above else -1 if missed_below else 0,
    )


@dataclass(frozen=True)
class Accounting:
    """A way to count: a cost that grows over the run, and one that is there before it."""

    cost: Cost
    fixed: float = 0.0


def accountings(models: Mapping[str, Any], setting: str) -> dict[str, Accounting]:
    """The protocol's costs of a point: FLOPs in three accountings, seconds, and projections."""
    warm = warm_start_flops(models, setting)
    teacher_rate = models["settings"][setting]["teacher"]["temperature_1"]["tokens_per_s"]

    def flops(point: Point) -> float:
        return sum(v for k, v in point["flops"].items() if k != "padding")

    def data_given(point: Point) -> float:
        return flops(point) - point["flops"].get("sample_teacher", 0)

    def device_s(point: Point) -> float:
        """The student's stages as measured, the teacher's sampling at its best batch."""
        tokens = point["tokens"]
        of_teacher = tokens.get("sampled_teacher", 0)
        all_sampled = of_teacher + tokens.get("sampled_student", 0)
        share = tokens.get("sampled_student", 0) / all_sampled if all_sampled else 0.0
        spent = point["device_s"]
        others = sum(v for k, v in spent.items() if k in ("score", "train"))
        return others + share * spent.get("generate", 0.0) + of_teacher / teacher_rate

    costs = {
        "flops": Accounting(flops),
        "flops_data_given": Accounting(data_given),
        "flops_with_warm_start": Accounting(flops, fixed=warm),
        "device_s": Accounting(device_s),
    }
    for pair in PAIRS:
        costs[f"projected_{pair}_s"] = Accounting(
            lambda point, pair=pair: projected_s(pair, point["tokens"])
        )
    return costs


def by_arm(runs: Sequence[Mapping[str, Any]], setting: str) -> dict[str, list[Mapping[str, Any]]]:
    """The setting's runs by arm, in the order of seeds."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in sorted(runs, key=lambda record: record["seed"]):
        if record["setting"] == setting:
            found.setdefault(record["arm"], []).append(record)
    return found


def level_of(models: Mapping[str, Any], setting: str, decoding: Decoding, percent: int) -> float:
    """The accuracy at which a part of the gap is closed.

    Raises:
        DataError: the student is as good as the teacher before any training.
    """
    rows, key = models["settings"][setting], TEMPERATURE[decoding]
    before, teacher = rows["student"][key]["accuracy"], rows["teacher"][key]["accuracy"]
    if teacher <= before:
        raise DataError(
            f"{setting}, {decoding}: the student has {before:.3f} before training and the teacher "
            f"{teacher:.3f}, so there is no gap to close; make the models again"
        )
    return before + percent / 100 * (teacher - before)


def costs_of(
    runs: Sequence[Mapping[str, Any]],
    models: Mapping[str, Any],
    setting: str,
    decoding: Decoding,
    percent: int,
    accounting: Accounting,
) -> list[Reached]:
    """Return each run's cost to reach the level."""
    before = models["settings"][setting]["student"][TEMPERATURE[decoding]]["accuracy"]
    level = level_of(models, setting, decoding, percent)
    found = [reached(record["curve"], before, level, decoding, accounting.cost) for record in runs]
    return [replace(each, cost=each.cost + accounting.fixed) for each in found]


def arm_row(
    arm: str, runs: Sequence[Mapping[str, Any]], models: Mapping[str, Any], setting: str
) -> dict[str, Any]:
    """One arm of a table: costs to every level, and its last evaluation, means over seeds."""
    last = [record["curve"][-1] for record in runs]
    row: dict[str, Any] = {
        "arm": arm,
        "seeds": len(runs),
        "learning_rate": runs[0]["learning_rate"],
        "warm_data_loss": _mean([record["warm_data_loss"] for record in runs]),
    }
    for decoding in DECODINGS:
        for key in (decoding, f"{decoding}_tokens", f"{decoding}_truncated"):
            row[key] = _mean([point[key] for point in last])
    for name, accounting in accountings(models, setting).items():
        for decoding in DECODINGS:
            for percent in LEVELS:
                found = costs_of(runs, models, setting, decoding, percent, accounting)
                row[f"{decoding}_{name}_to_{percent}"] = _mean([f.cost for f in found])
                row[f"{decoding}_{name}_to_{percent}_reached"] = sum(f.within for f in found)
    return row


def ratios_of(
    found: Mapping[str, Sequence[Mapping[str, Any]]], models: Mapping[str, Any], setting: str
) -> list[dict[str, Any]]:
    """SFT over OPD, for the primary pair and the cheapest of each side, in every accounting; in
    FLOPs the other pairs too."""
    rows: list[dict[str, Any]] = []
    for name, accounting in accountings(models, setting).items():
        for decoding in DECODINGS:
            for percent in LEVELS:
                costs = {
                    arm: costs_of(runs, models, setting, decoding, percent, accounting)
                    for arm, runs in found.items()
                }
                pairs = {"sft_to_opd": PRIMARY, "sft_to_opd_cheapest": _cheapest(costs)}
                pairs |= COMPARED if name == "flops" else {}
                for kind, (above, below) in pairs.items():
                    if above not in costs or below not in costs:
                        continue
                    ratio = ratio_of(costs[above], costs[below])
                    if ratio is not None:
                        rows.append(
                            {
                                "kind": kind,
                                "accounting": name,
                                "decoding": decoding,
                                "percent": percent,
                                "above": above,
                                "below": below,
                                "seeds": min(len(costs[above]), len(costs[below])),
                                **vars(ratio),
                            }
                        )
    return rows


def slowdowns_of(
    found: Mapping[str, Sequence[Mapping[str, Any]]], models: Mapping[str, Any], setting: str
) -> dict[str, float]:
    """Per projected pair: how many times slower than its rate the teacher must sample for the
    primary ratio to be `CLAIMED`, at half of the gap and greedy. Nothing else costs more then."""
    sft, opd = (found.get(arm) for arm in PRIMARY)
    if sft is None or opd is None:
        return {}
    slowdowns: dict[str, float] = {}
    for pair in PAIRS:
        whole = Accounting(lambda point, pair=pair: projected_s(pair, point["tokens"]))
        sampling = Accounting(
            lambda point, pair=pair: (
                point["tokens"].get("sampled_teacher", 0) / stage_rates(pair)["sample_teacher"]
            )
        )

        def seconds(runs: Sequence[Mapping[str, Any]], accounting: Accounting) -> float:
            reached_each = costs_of(runs, models, setting, "greedy", LEVELS[0], accounting)
            return _mean([each.cost for each in reached_each])

        by_teacher = seconds(sft, sampling)
        if by_teacher > 0:
            others = seconds(sft, whole) - by_teacher
            slowdowns[pair] = (CLAIMED * seconds(opd, whole) - others) / by_teacher
    return slowdowns


def _cheapest(costs: Mapping[str, Sequence[Reached]]) -> tuple[str, str]:
    """The cheapest SFT arm and the cheapest OPD arm; one that missed the level comes last."""

    def rank(arm: str) -> tuple[int, float]:
        missed = sum(not each.within for each in costs[arm])
        return missed, _mean([each.cost for each in costs[arm]])

    sides = [[arm for arm in side if arm in costs] for side in (SFT_ARMS, OPD_ARMS)]
    sft, opd = (min(side, key=rank) if side else "" for side in sides)
    return sft, opd


def figures_of(
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    ratios: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, float]:
    """The flat figures: greedy decoding and marginal FLOPs where a key names neither."""
    figures: dict[str, float] = {}
    for setting, rows in tables.items():
        for row in rows:
            for percent in LEVELS:
                name = f"{setting}_{row['arm']}_flops_to_{percent}"
                figures[name] = row[f"greedy_flops_to_{percent}"]
                if row[f"greedy_flops_to_{percent}_reached"] < row["seeds"]:
                    figures[f"{name}_bound"] = 1
            for decoding in DECODINGS:
                figures[f"{setting}_{row['arm']}_final_{decoding}"] = row[decoding]
    for setting, rows in ratios.items():
        for row in rows:
            for decoding, suffix in (("greedy", ""), ("sampled", "_sampled")):
                if row["decoding"] != decoding or row["seeds"] < 2:
                    continue
                accounting = "" if row["accounting"] == "flops" else f"_{row['accounting']}"
                name = f"{setting}_ratio_{row['kind']}{accounting}{suffix}_{row['percent']}"
                figures[name] = row["value"]
                figures[f"{name}_low"], figures[f"{name}_high"] = row["low"], row["high"]
                if row["bound"]:
                    figures[f"{name}_bound"] = row["bound"]
    return figures


def summarize(runs: Sequence[Mapping[str, Any]], models: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures, tables, ratios and curves of all runs."""
    settings = [name for name in SETTINGS if any(r["setting"] == name for r in runs)]
    grouped = {setting: by_arm(runs, setting) for setting in settings}
    tables = {
        setting: [arm_row(arm, of_arm, models, setting) for arm, of_arm in found.items()]
        for setting, found in grouped.items()
    }
    ratios = {setting: ratios_of(found, models, setting) for setting, found in grouped.items()}
    seeds = [len(of_arm) for found in grouped.values() for of_arm in found.values()]
    counts = {
        "num_settings": len(settings),
        "num_arms": min(len(found) for found in grouped.values()),
        "num_seeds": min(seeds),
        "num_runs": len(runs),
        "num_heldout": min(point["problems"] for r in runs for point in r["curve"]),
    }
    slowdowns = {
        f"{setting}_teacher_slowdown_for_{CLAIMED}x_{pair}": value
        for setting, found in grouped.items()
        for pair, value in slowdowns_of(found, models, setting).items()
    }
    return {
        "figures": {**figures_of(tables, ratios), **slowdowns, **counts},
        "tables": tables,
        "ratios": ratios,
        "curves": [_compact(record) for record in runs],
    }


def _compact(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's curve as columns, with total FLOPs."""
    curve = record["curve"]
    return {
        **{key: record[key] for key in ("setting", "arm", "seed", "learning_rate", "commit")},
        "step": [point["step"] for point in curve],
        "greedy": [point["greedy"] for point in curve],
        "sampled": [point["sampled"] for point in curve],
        "flops": [
            float(sum(v for k, v in point["flops"].items() if k != "padding")) for point in curve
        ],
        "truncated": [point["sampled_truncated"] for point in curve],
        "tokens": [point["sampled_tokens"] for point in curve],
    }


def trial_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tuning trial's rate and its accuracies after the last step."""
    last = record["curve"][-1]
    kept = {key: record[key] for key in ("setting", "arm", "learning_rate")}
    return kept | {decoding: last[decoding] for decoding in DECODINGS}


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log", type=Path, default=Path("runs/evidence/runs.jsonl"))
    parser.add_argument("--trials-log", type=Path, default=Path("runs/evidence/trials.jsonl"))
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--runs-on", help="machine and versions of the runs, in words")
    arguments = parser.parse_args()
    models = json.loads((arguments.models / "models.json").read_text())
    runs = read_jsonl(arguments.log)
    if not runs:
        raise SystemExit(f"{arguments.log} holds no finished run")
    result = summarize(runs, models)
    trials = read_jsonl(arguments.trials_log) if arguments.trials_log.exists() else []
    print(
        write_result(
            "evidence",
            result["figures"],
            folder=arguments.results,
            models=models,
            runs_on=arguments.runs_on,
            trials=[trial_row(record) for record in trials],
            **{key: result[key] for key in ("tables", "ratios", "curves")},
        )
    )


if __name__ == "__main__":
    main()
