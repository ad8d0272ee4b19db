"""The form of the records that a run writes, and what reads them by it.

Readers get records of this form or a `DataError` that names the file, the record and the field:
nothing that was changed by hand, half copied or written by something else is shown or resumed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_distill.errors import DataError
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.utils.json_text import read_json_object
from qwen3_distill.utils.shown import shown

LARGEST = 1e30
"""No number of a run has a larger magnitude; sums and differences of such are finite."""


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number of a magnitude that a run can have."""
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST


def is_count(value: Any) -> bool:
    """Whether a value read from JSON is a whole number from 0 on."""
    return type(value) is int and 0 <= value < 2**53


def _is_whole(value: Any) -> bool:
    return is_number(value) and 0 <= value < 2**53 and value == int(value)


def _is_share(value: Any) -> bool:
    return is_number(value) and -1e-6 <= value <= 1 + 1e-6


def _is_duration(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1e12


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


@dataclass(frozen=True)
class _Field:
    holds: Callable[[Any], bool]
    what: str
    required: bool = True


_COUNT, _TEXT = _Field(is_count, "a whole number from 0 on"), _Field(_is_text, "text")
_WHOLE = _Field(_is_whole, "a whole number from 0 on")
_SHARE = _Field(_is_share, "a number from 0 to 1")
_DURATION = _Field(_is_duration, "seconds")
_Fields = Mapping[str, _Field]


def _optional(field: _Field) -> _Field:
    return _Field(field.holds, field.what, required=False)


_STEP: _Fields = {
    "step": _COUNT,
    "wall_s": _DURATION,
    "tokens/generated": _WHOLE,
    "tokens/trained": _WHOLE,
}
_EVALUATION: _Fields = {
    "step": _COUNT,
    "model": _TEXT,
    "accuracy": _SHARE,
    "ci_low": _SHARE,
    "ci_high": _SHARE,
    "num_problems": _COUNT,
    "samples_per_problem": _optional(_COUNT),
    "wall_s": _optional(_DURATION),
    "time/evaluate_s": _optional(_DURATION),
    "temperature": _optional(_Field(is_number, "a number")),
    "mean_tokens": _optional(_Field(is_number, "a number")),
    "truncated_fraction": _optional(_SHARE),
}
_LEDGER: _Fields = {"step": _COUNT, "trained": _TEXT, "dropped": _TEXT, "tags": _optional(_TEXT)}
_ACCURACY: _Fields = {"value": _SHARE, "ci_low": _SHARE, "ci_high": _SHARE}


def read_steps(path: Path, *, complete: bool = True) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``: one record per step, steps ascending; empty if there is no file.

    Args:
        complete: every record must have the wall time and the token counts; else the step alone.

    Raises:
        DataError: a record has another form.
    """
    fields = _STEP if complete else {**{k: _optional(f) for k, f in _STEP.items()}, "step": _COUNT}
    records = _read(path, fields)
    for number, record in enumerate(records, 1):
        for key, value in record.items():
            if "/" in key and value is not None and not is_number(value):
                raise _refused(path, number, key, "a finite number or null", value)
            if key.startswith("time/") and value is not None and not _is_duration(value):
                raise _refused(path, number, key, "seconds", value)
    _require_ascending(path, records)
    return records


def read_evaluations(path: Path, *, complete: bool = True) -> list[dict[str, Any]]:
    """Read ``evaluations.jsonl``: a record per step and model; empty if there is no file.

    Args:
        complete: every record must have the time that it took.

    Raises:
        DataError: a record has another form.
    """
    return _read(path, {**_EVALUATION, "wall_s": _DURATION} if complete else _EVALUATION)


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Read ``ledger.jsonl``: one record per step; empty if there is no file.

    Raises:
        DataError: a record has another form.
    """
    records = _read(path, _LEDGER)
    _require_ascending(path, records)
    return records


def read_summary(path: Path) -> dict[str, Any]:
    """Read ``summary.json``.

    Raises:
        FileNotFoundError: there is none.
        DataError: it has another form.
    """
    remedy = "remove the file: the same command writes it again from the run's records"
    try:
        summary = read_json_object(path)
    except ValueError as error:
        raise DataError(f"{path} is no summary: {error}; {remedy}") from error
    problem = _problem(summary, {"steps": _COUNT}) or _wall_problem(summary.get("wall_s"))
    tokens = summary.get("tokens", {})
    if not isinstance(tokens, dict) or not all(map(_is_whole, tokens.values())):
        problem = problem or f"tokens is {shown(tokens)}, expected counts"
    for key in ("accuracy", "second_accuracy"):
        problem = problem or _accuracies_problem(key, summary.get(key))
    if problem is not None:
        raise DataError(f"{path} is no summary: {problem}; {remedy}")
    return summary


def _wall_problem(wall_s: Any) -> str | None:
    if isinstance(wall_s, dict) and "total" in wall_s and all(map(_is_duration, wall_s.values())):
        return None
    return f"wall_s is {shown(wall_s)}, expected seconds by stage with a total"


def _accuracies_problem(key: str, accuracies: Any) -> str | None:
    if accuracies is None:
        return None
    if not isinstance(accuracies, dict):
        return f"{key} is {shown(accuracies)}, expected an object"
    for who, value in accuracies.items():
        if who == "temperature":
            if not is_number(value):
                return f"{key}.{who} is {shown(value)}, expected a number"
        elif value is not None:
            if not isinstance(value, dict):
                return f"{key}.{who} is {shown(value)}, expected an object or null"
            if (problem := _problem(value, _ACCURACY)) is not None:
                return f"{key}.{who}.{problem}"
    if key == "second_accuracy" and "temperature" not in accuracies:
        return f"{key} has no temperature"
    return None


def _read(path: Path, fields: _Fields) -> list[dict[str, Any]]:
    try:
        records = read_jsonl(path)
    except FileNotFoundError:
        return []
    for number, record in enumerate(records, 1):
        if (problem := _problem(record, fields)) is not None:
            raise DataError(f"{path}: record {number}: {problem}; restore the file from a copy")
    return records


def _problem(record: Mapping[str, Any], fields: _Fields) -> str | None:
    for key, field in fields.items():
        if key not in record:
            if field.required:
                return f"{key} is missing, expected {field.what}"
        elif not field.holds(record[key]):
            return f"{key} is {shown(record[key])}, expected {field.what}"
    return None


def _require_ascending(path: Path, records: list[dict[str, Any]]) -> None:
    for number in range(1, len(records)):
        before, step = records[number - 1]["step"], records[number]["step"]
        if step <= before:
            raise DataError(
                f"{path}: record {number + 1} is of step {step}, after one of step {before}; "
                "restore the file from a copy"
            )


def _refused(path: Path, number: int, key: str, expected: str, value: object) -> DataError:
    return DataError(
        f"{path}: record {number}: {key} is {shown(value)}, expected {expected}; restore the file "
        "from a copy"
    )
