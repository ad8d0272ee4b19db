"""Values that an answer states: numbers, times of day, lists; and when two of them are equal."""

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

PERCENT = "percent"
ROUNDED_FROM_PLACES = 6
"""A decimal of so many places equals a fraction that it is the rounded value of."""


@dataclass(frozen=True)
class Number:
    """An exact number; ``unit`` is None where none, or none that is known, was given."""

    value: Fraction
    unit: str | None = None
    places: int = 0
    """Decimal places as written."""


@dataclass(frozen=True)
class Infinity:
    """An end of an interval."""

    sign: int


@dataclass(frozen=True)
class Clock:
    """A time of day or a ratio, ``3:30``: its parts, and ``am`` or ``pm`` where given."""

    parts: tuple[int, ...]
    half: str | None = None


@dataclass(frozen=True)
class Listing:
    """Several values. Brackets are empty for a bare list."""

    opening: str
    closing: str
    items: "tuple[Number | Infinity, ...]"


Value: TypeAlias = Number | Clock | Listing


def equal(reference: Value, answer: Value) -> bool:
    """Return whether the answer states the reference's value."""
    if isinstance(reference, Listing) and isinstance(answer, Listing):
        return _equal_lists(reference, answer)
    if isinstance(reference, Clock) or isinstance(answer, Clock):
        return _equal_times(reference, answer)
    reference, answer = _single(reference), _single(answer)
    if isinstance(reference, Number) and isinstance(answer, Number):
        return _equal_numbers(reference, answer)
    return False


def _single(value: Value) -> Value:
    """Return the only element of a set of one."""
    if isinstance(value, Listing) and value.opening == "{" and len(value.items) == 1:
        item = value.items[0]
        return item if isinstance(item, Number) else value
    return value


def _equal_numbers(reference: Number, answer: Number) -> bool:
    given, units = answer.value, (reference.unit, answer.unit)
    if units[0] == units[1] or (None in units and PERCENT not in units):
        return _same(reference.value, given, answer.places)
    if units == (PERCENT, None):
        return given in (reference.value, reference.value / 100)
    if units == (None, PERCENT):
        # 0.5 is 50%; 50 may have been asked for in percent.
        return given == reference.value * 100 or (
            given == reference.value and not 0 < abs(given) < 1
        )
    return False


def _same(reference: Fraction, given: Fraction, places: int) -> bool:
    if reference == given:
        return True
    denominator = reference.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    endless = denominator > 1
    return endless and places >= ROUNDED_FROM_PLACES and round(reference, places) == given


def _equal_times(reference: Value, answer: Value) -> bool:
    first, second = _as_clock(reference), _as_clock(answer)
    if first is None or second is None:
        return False
    if first.half is not None and second.half is not None:
        return _day_parts(first) == _day_parts(second)
    if first.parts == second.parts:
        return True
    # One of them has no half of the day: it may be written with 24 hours.
    return _day_parts(first) == _day_parts(second)


def _as_clock(value: Value) -> Clock | None:
    """Return a time; a whole number is one in full hours if the other side says am or pm."""
    if isinstance(value, Clock):
        return Clock((*value.parts, 0), value.half) if len(value.parts) == 1 else value
    if isinstance(value, Number) and value.unit is None and value.value.denominator == 1:
        return Clock((int(value.value), 0), "number")
    return None


def _day_parts(clock: Clock) -> tuple[int, ...]:
    hour, *rest = clock.parts
    if clock.half in ("am", "pm"):
        hour = hour % 12 + (12 if clock.half == "pm" else 0)
    return (hour, *rest)


def _equal_lists(reference: Listing, answer: Listing) -> bool:
    brackets = [(value.opening, value.closing) for value in (reference, answer)]
    if len(reference.items) != len(answer.items):
        return False
    unordered = all(pair in (("", ""), ("{", "}")) for pair in brackets)
    if not unordered and brackets[0] != brackets[1] and ("", "") not in brackets:
        return False
    if unordered:
        left = list(answer.items)
        for item in reference.items:
            match = next((other for other in left if _equal_items(item, other)), None)
            if match is None:
                return False
            left.remove(match)
        return True
    return all(map(_equal_items, reference.items, answer.items))


def _equal_items(first: Number | Infinity, second: Number | Infinity) -> bool:
    if isinstance(first, Number) and isinstance(second, Number):
        return _equal_numbers(first, second)
    return first == second
