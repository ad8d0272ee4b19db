"""Units and currencies that are told apart. Other words after a number are not compared."""

import re

_NAMES: dict[str, str] = {
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "inch": "inch inches",
    "foot": "ft foot feet",
    "yard": "yd yards yard",
    "mile": "mi mile miles",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms kilos",
    "mg": "mg milligram milligrams",
    "ounce": "oz ounce ounces",
    "pound-mass": "lb lbs",
    "second": "s sec secs second seconds",
    "minute": "min mins minute minutes",
    "hour": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "yr yrs year years",
    "liter": "l L liter liters litre litres",
    "ml": "ml mL milliliter milliliters millilitre millilitres",
    "gallon": "gal gallon gallons",
    "percent": "% percent pct",
    "degree": "° deg degree degrees",
    "celsius": "°C",
    "fahrenheit": "°F",
    "radian": "rad radian radians",
    "dollar": "$ US$ USD dollar dollars bucks",
    "cent": "¢ cent cents",
    "euro": "€ EUR euro euros",
    "sterling": "£ GBP",
    "yen": "¥ JPY yen",
    "rupee": "₹ INR Rs Rs. rupee rupees",
}
_UNITS = {word: unit for unit, words in _NAMES.items() for word in words.split()}
_WORD = r"°[CF]\b|US\$|[%°$¢€£¥₹]|[A-Za-z]+"
_POWER = r"(?:\s?\^\s?\{?(-?\d)\}?|([23])(?![\d.])|\s(squared|cubed)\b)"
_FACTOR = re.compile(
    rf"\s?(?P<shape>square|sq\.?|cubic|cu\.?)?\s?(?P<word>{_WORD})(?P<power>{_POWER})?"
)
_PER = re.compile(r"\s?(?:/|per|an?(?=\s(?:second|minute|hour|day|week|month|year)s?\b))\s?")
_SHORT = {"mph": "mile/hour", "kph": "km/hour", "kmh": "km/hour"}


def leading_unit(text: str, *, strict: bool) -> tuple[str | None, str]:
    """Return the known unit that a text begins with, in one spelling, and the rest of the text.

    Args:
        strict: a single letter right after the number is a factor of an expression, as in ``2m``.
    """
    if strict and re.match(r"[A-Za-z](?![A-Za-z/^°])", text):
        return None, text
    found = _one(text)
    if found is None:
        return None, text
    unit, rest = found
    per = _PER.match(rest)
    if per and (below := _one(rest[per.end() :])) is not None:
        unit, rest = f"{unit}/{below[0]}", below[1]
    return unit, rest


def _one(text: str) -> tuple[str, str] | None:
    match = _FACTOR.match(text)
    if match is None:
        return None
    word = match["word"]
    if word.lower() in _SHORT:
        return _SHORT[word.lower()], text[match.end() :]
    unit = _UNITS.get(word) or (_UNITS.get(word.lower()) if len(word) > 1 else None)
    if unit is None:
        return None
    power = _power(match)
    return (unit if power == 1 else f"{unit}^{power}"), text[match.end() :]


def _power(match: "re.Match[str]") -> int:
    if match["shape"]:
        return 2 if match["shape"].startswith("s") else 3
    written = next((group for group in match.groups()[3:] if group), None)
    return {"squared": 2, "cubed": 3}.get(written, 0) or int(written) if written else 1
