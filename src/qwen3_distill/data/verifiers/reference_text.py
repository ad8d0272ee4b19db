r"""Reads reference answers: as one plain value, as LaTeX for math-verify, or not at all.

A reference that can be meant in two ways is refused rather than read: ``1.234,5``, ``1,5``,
``12 00``, ``3-5``, ``2024-05-18``. So is one in which math-verify would multiply what merely stands
side by side.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from qwen3_distill.data.verifiers.answer_text import BOXED, box_answer, last_boxes
from qwen3_distill.data.verifiers.number_text import cleaned, plain, read
from qwen3_distill.data.verifiers.number_values import Clock, Infinity, Listing, Value

FINAL_ANSWER_MARK = "####"
"""GSM8K's mark before the final answer."""
MAX_REFERENCE_CHARS = 4000
_MATH = re.compile(r"\$\$?([^$]+)\$\$?")
_MISREAD = re.compile(
    r"\d\s+\.?\d|[A-Za-z]\s*\d|\d\s+[(\[]\s*[\d.]+\s*[)\]]|\d[.,]\d+[.,]\d|\d,\d(?!\d\d)|\d,\d{3}\d"
    r"|\d\s*/\s*\d+\s*/|\d\s*['\"]"
    r"|^-?\s*\d+\s*-\s*\d+(?:\s*-\s*\d+)?$|\b(?i:no|up|ok|so|in|on|or|and|to|if|is|of)\b|^--|\.\.|\d:\d|[?;]|####"
)
_NO_ANSWER = re.compile(
    r"^[-+]?(?:n\s?/\s?a|inf(?:inity)?|nan|null|none)\.?$|\d\.{2,}", re.IGNORECASE
)
"""A word that stands for no number, or digits that go on."""


@dataclass(frozen=True)
class Reference:
    """A usable reference: its value where it is a plain one, and its LaTeX."""

    value: Value | None
    latex: str


def read_reference(answer: str) -> Reference | None:
    """Read a reference answer; None if it is not usable.

    One without ``value`` is usable if math-verify can parse its LaTeX.
    """
    text = answer.rsplit(FINAL_ANSWER_MARK, 1)[-1].strip()
    if not text or len(text) > MAX_REFERENCE_CHARS or _NO_ANSWER.search(text):
        return None
    text = cleaned(text)
    if BOXED in text:
        boxes = last_boxes(text)
        found = box_answer(boxes, strict=True)
        return _reference(found.values, found.latex or boxes)
    whole = _strictly(text) if "?" in text else read(plain(text), strict=True)
    maths = list(_MATH.finditer(text))
    if whole is None and maths:
        if re.search(r"\d", text[maths[-1].end() :]):
            return None
        body = maths[-1][1]
        return _reference(_strictly(body), f"${body}$")
    if whole is None:
        whole = _strictly(text)
    # math-verify takes LaTeX only where something marks it as LaTeX.
    return _reference(whole, text if "$" in text else f"${text}$")


def _strictly(text: str) -> list[Value] | None:
    """Return the readings of a text; empty if math-verify would read it as something else."""
    short = plain(text)
    values = read(short, strict=True)
    if values is None and "\\" not in short and _MISREAD.search(_outside_brackets(short)):
        return []
    if values is None and re.search(r"\d\s+\d", short):
        return []
    if values and "?" in short:
        return []
    return values


def _outside_brackets(text: str) -> str:
    """Return a text in which commas between brackets, as in ``f(1,5)``, are gone."""
    return re.sub(r"[(\[{][^()\[\]{}]*[)\]}]", lambda match: match[0].replace(",", " , "), text)


def _reference(values: list[Value] | None, latex: str) -> Reference | None:
    if values is None:
        return Reference(None, latex)
    if len(values) != 1:
        return None
    return Reference(values[0], f"${latex_of(values[0])}$")


def latex_of(value: Value) -> str:
    """Return a value as LaTeX that math-verify reads without doubt."""
    if isinstance(value, Clock):
        return ":".join(str(part) for part in value.parts)
    if isinstance(value, Listing):
        items = ", ".join(
            ("-" if item.sign < 0 else "") + "\\infty"
            if isinstance(item, Infinity)
            else _fraction(item.value)
            for item in value.items
        )
        opening, closing = value.opening or "{", value.closing or "}"
        slash = "\\" if opening == "{" else ""
        return f"{slash}{opening}{items}{slash}{closing}"
    return _fraction(value.value)


def _fraction(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
