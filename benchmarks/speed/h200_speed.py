"""Puts the figures of one H200 together from the results that were measured one by one.

    python -m benchmarks.speed.h200_speed --results out

reads what is there of `h200_rows_once` and `h200_rows` (`speed/learners.py`),
`h200_shipped_streaming`, `h200_topk16`, `h200_one_start` and `h200_tails` (`speed/one_start.py`),
`h200_shipped_streaming_trl` and `h200_trl` (`speed/trl_distillation.py`), `h200_start`
(`speed/start.py`), `h200_learners` and `time_plan`, and writes `h200_speed.json`: the figures, each
beside its goal, and what was not measured. Of two results with a figure the one that is named first
counts. Ratios are of results of one card; FP8's is that of `h200_learners` where the rows have
none. Machine and versions are those of `h200_one_start`, or of the first there.

``with_levers`` of a goal has the figures with settings that are not shipped, by the result that
says which, and the goal is met if each of them meets it. `NOTES` have conditions.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS, command_line, commit
from benchmarks.speed.learners import ROUNDED
from qwen3_distill.utils.files import write_json_atomic

_ROWS = ("h200_rows_once", "h200_rows")
_SOURCES = (
    *("h200_shipped_streaming", "h200_topk16", "h200_one_start", "h200_tails"),
    *_ROWS,
    *("h200_shipped_streaming_trl", "h200_trl", "h200_start"),
)
_OTHERS = ("h200_learners", "time_plan")
"""Results of other cards, or of none."""
_STEP = "opd_tok_s_256x512"
_FOUR = "opd_tok_s_n4"
_FP8 = "train_unsloth_fp8_backward_128x512_n4_vs_unsloth"
_WITH_BOTH = ("h200_levers_n4", "h200_levers_micro", "h200_levers_beside")
_LEVERS: dict[str, dict[str, str]] = {
    "train_fp8_vs_unsloth": {"h200_fp8_learners_cudnn": _FP8, "h200_rows_5120": _FP8},
    _STEP: dict.fromkeys(("h200_levers", "h200_levers_xqa", *_WITH_BOTH), _STEP),
    _FOUR: dict.fromkeys((*_WITH_BOTH, "h200_levers_priority"), _FOUR),
    "longtail8_vs_sequential": {"h200_tails_packed": "longtail8_vs_sequential"},
}
"""Results with settings that are not shipped, and what the figure is called there."""
_BESIDE_TRL = {
    "h200_levers": "h200_levers_trl",
    "h200_levers_n4": "h200_levers_n4_trl",
    "h200_levers_beside": "h200_shipped_streaming_trl",
}
"""With such settings, ours and TRL's result of the same card."""
GOALS: dict[str, float | None] = {
    "train_fp8_vs_unsloth": 1.25,
    "train_prefix_n4_ratio": 1.15,
    "train_prefix_n4_long_prompt_ratio": 1.3,
    "train_packing_longtail_ratio": None,
    "opd_tok_s_256x512": 10_500,
    "opd_tok_s_n4": 12_000,
    "fixed_vs_trl": 2.2,
    "longtail8_vs_trl": 3,
    "longtail8_vs_sequential": 2,
    "score_topk16_tok_s": 42_000,
    "topk16_vs_sampled_step": -1.15,
    "opd_topk16_tok_s": None,
    "opd_topk16_streaming_tok_s": None,
    "host_share_of_step": -0.02,
    "cold_start_s": -180,
    "warm_start_s": -90,
    "time_plan_error_pct": -15,
    "gb10_public_error_pct": None,
}
"""At least this, or at most where it is negative; None: no goal, it is only measured."""

NOTES: Mapping[str, str] = {
    "opd_tok_s_256x512": "configs/h200-streaming.yaml with the sampled token's loss",
    "opd_tok_s_n4": "that config and loss on another card, prompts computed once",
    "longtail8_vs_trl": "TRL with one size of micro-batches, nothing recomputed",
    "fixed_vs_trl": "TRL with one size of micro-batches, nothing recomputed",
    "opd_topk16_streaming_tok_s": "configs/h200-streaming.yaml, its own loss",
    "opd_topk16_tok_s": "sequential, before our plugins for SGLang",
    "topk16_vs_sampled_step": "sequential, before our plugins for SGLang",
    "time_plan_error_pct": "six steps of one start on an H200; no H100",
}
"""Conditions of measurements that their figures' names do not tell."""

Results = Mapping[str, Mapping[str, Any]]


def figures_of(results: Results) -> dict[str, float]:
    """Return every figure that the results give."""
    flat = dict[str, float]()
    # `time_plan` has errors of older results too: of it, only what is public of another device.
    public = results.get("time_plan", {}).get("figures", {}).get("gb10_public_error_pct")
    if public is not None:
        flat["gb10_public_error_pct"] = public
    fp8 = results.get("h200_learners", {}).get("figures", {})
    known = [
        fp8[f"train_{name}_vs_unsloth"] for name in ROUNDED if f"train_{name}_vs_unsloth" in fp8
    ]
    if known:  # the faster counts
        flat["train_fp8_vs_unsloth"] = max(known)
    for source in reversed(_SOURCES):
        flat |= results.get(source, {}).get("figures", {})
    for source in ("h200_tails", "h200_one_start"):
        tails = results.get(source, {}).get("parts", {}).get("longtail8", {})
        if "streaming" in tails:
            flat["longtail8_tok_s"] = tails["streaming"]["tok_s"]
    ratios = {
        "fixed_vs_trl": ("opd_tok_s_256x512", "trl_fixed_tok_s"),
        "longtail8_vs_trl": ("longtail8_tok_s", "trl_longtail8_tok_s"),
    }
    for name, (ours, theirs) in ratios.items():
        if ours in flat and theirs in flat:
            flat[name] = flat[ours] / flat[theirs]
    flat |= _of_learners(results)
    return {name: round(flat[name], 4) for name in GOALS if name in flat}


def _of_learners(results: Results) -> dict[str, float]:
    """Return ratios to unsloth as it is, each of two rates of one result."""
    asked = {
        "train_prefix_n4_ratio": (("unsloth_shared",), "128x512_n4"),
        "train_prefix_n4_long_prompt_ratio": (("unsloth_shared",), "300x508_n4"),
        "train_packing_longtail_ratio": (("unsloth_packed",), "128xlongtail8_n1"),
        "train_fp8_vs_unsloth": (ROUNDED, "128x512_n4"),
    }
    found = dict[str, float]()
    for source in reversed(_ROWS):
        rates = results.get(source, {}).get("figures", {})
        for name, (learners, work) in asked.items():
            as_it_is = f"train_unsloth_{work}_tok_s"
            theirs = [f"train_{learner}_{work}_tok_s" for learner in learners]
            if as_it_is in rates and (there := [rates[rate] for rate in theirs if rate in rates]):
                found[name] = max(there) / rates[as_it_is]
    return found


def with_levers(results: Results) -> dict[str, dict[str, float]]:
    """Return the figures that were measured with settings that are not shipped, by result."""
    found = dict[str, dict[str, float]]()
    for name, sources in _LEVERS.items():
        for source, key in sources.items():
            value = _figure(results, source, key)
            if value is not None:
                found.setdefault(name, {})[source] = round(value, 4)
    for ours, theirs in _BESIDE_TRL.items():
        step, trl = _figure(results, ours, _STEP), _figure(results, theirs, "trl_fixed_tok_s")
        if step is not None and trl is not None:
            found.setdefault("fixed_vs_trl", {})[ours] = round(step / trl, 4)
    return found


def _figure(results: Results, source: str, key: str) -> float | None:
    """Return a result's figure, None where it has none: a part may not have been begun."""
    return results.get(source, {}).get("figures", {}).get(key)


def is_met(value: float, goal: float) -> bool:
    """Whether a figure reaches its goal."""
    return value >= goal if goal > 0 else value <= -goal


def verdicts(
    figures: Mapping[str, float], levers: Mapping[str, Mapping[str, float]] | None = None
) -> list[dict[str, Any]]:
    """Return each goal with its figure, and with that of ``levers`` where there is one."""
    rows = list[dict[str, Any]]()
    for name, goal in GOALS.items():
        row = {
            "figure": name,
            "goal": None if goal is None else f"{'>=' if goal > 0 else '<='} {abs(goal):g}",
            "value": figures.get(name),
            "met": None if goal is None or name not in figures else is_met(figures[name], goal),
        }
        if name in NOTES:
            row["note"] = NOTES[name]
        if levers and name in levers:
            row["with_levers"] = levers[name]
            row["met_with_levers"] = (
                None if goal is None else all(is_met(v, goal) for v in levers[name].values())
            )
        rows.append(row)
    return rows


_ALL = tuple(
    dict.fromkeys(
        [
            *_SOURCES,
            *_OTHERS,
            *(source for sources in _LEVERS.values() for source in sources),
            *_BESIDE_TRL,
            *_BESIDE_TRL.values(),
        ]
    )
)


def read(folder: Path, names: Sequence[str] = _ALL) -> dict[str, dict[str, Any]]:
    """Read the results that are there."""
    files = {name: folder / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    results = read(arguments.results)
    measured = [results[n] for n in ("h200_one_start", *_SOURCES) if n in results]
    if not measured:
        parser.error(f"{arguments.results} has none of {', '.join(_SOURCES)}")
    figures = figures_of(results)
    content = {
        "name": "h200_speed",
        "command": command_line(),
        "commit": commit(),
        "machine": measured[0]["machine"],
        "versions": measured[0]["versions"],
        "figures": figures,
        "goals": verdicts(figures, with_levers(results)),
        "sources": {
            name: {key: result[key] for key in ("command", "commit", "machine")}
            for name, result in results.items()
        },
    }
    write_json_atomic(arguments.results / "h200_speed.json", content)
    for row in content["goals"]:
        print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
