"""The form of a trace's events, by which a trace is read again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen3_distill.errors import DataError
from qwen3_distill.recording.records import is_count, is_number
from qwen3_distill.utils.shown import shown


def check_events(events: Sequence[Mapping[str, Any]], where: str) -> None:
    """Check that events have the form that `Trace` writes.

    Raises:
        DataError: names the first one that has not.
    """
    named = {
        event["tid"] for event in events if event.get("name") == "thread_name" and _is_naming(event)
    }
    for number, event in enumerate(events, 1):
        holds = _FORMS.get(str(event.get("ph")))
        on_named = event.get("ph") in ("C", "M") or (
            is_count(event.get("tid")) and event["tid"] in named
        )
        if holds is None or not holds(event) or not on_named:
            raise DataError(f"{where}: event {number} is none of a run's trace: {shown(event)}")


def _is_naming(event: Mapping[str, Any]) -> bool:
    arguments = event.get("args")
    if not isinstance(arguments, dict):
        return False
    if event.get("name") != "thread_name":
        return True
    return is_count(event.get("tid")) and isinstance(arguments.get("name"), str)


def _is_begin(event: Mapping[str, Any]) -> bool:
    return _is_moment(event.get("ts")) and isinstance(event.get("name"), str)


def _is_end(event: Mapping[str, Any]) -> bool:
    return _is_moment(event.get("ts"))


def _is_step(event: Mapping[str, Any]) -> bool:
    arguments: Any = event.get("args")
    length: Any = event.get("dur")
    return (
        _is_begin(event)
        and _is_moment(length)
        and length >= 0
        and isinstance(arguments, dict)
        and is_count(arguments.get("step"))
    )


def _is_counter(event: Mapping[str, Any]) -> bool:
    arguments = event.get("args")
    return _is_begin(event) and isinstance(arguments, dict) and is_number(arguments.get("value"))


def _is_moment(value: Any) -> bool:
    return is_number(value) and -1e18 <= value <= 1e18


_FORMS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "M": _is_naming,
    "B": _is_begin,
    "E": _is_end,
    "X": _is_step,
    "i": _is_begin,
    "C": _is_counter,
}
