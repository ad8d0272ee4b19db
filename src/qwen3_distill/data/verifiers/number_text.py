r"""Reads numbers as people write them: signs, separators, fractions, units, times, lists.

`read` takes a whole text, `read_prefix` the number that a text begins with. A text that can be
meant in two ways has two readings. No reading: it is no plain number; math-verify may know it.
"""

# ruff: noqa: RUF001 - look-alike signs are what is read

import re
from fractions import Fraction

from qwen3_distill.data.verifiers.number_units import leading_unit
from qwen3_distill.data.verifiers.number_values import Clock, Infinity, Listing, Number, Value

_MAX_EXPONENT = 400
_MAX_CHARS = 1000
"""Longer texts are no plain values: reading time is quadratic in it."""
_SPACES = "\u00a0\u1680\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("‐‑﹣－", "-"),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
        **dict.fromkeys(_SPACES, " "),
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        "。": ". ", "！": "!", "？": "?", "；": ";",
        "％": "%", "：": ":", "．": ".", "，": ",", "（": "(", "）": ")", "＋": "+", "＝": "=",
        "＄": "$", "∕": "/", "⁄": "/", "⋅": "·", "∙": "·", "´": "'", "’": "'", "˚": "°", "º": "°",
    }
)  # fmt: skip
_VULGAR = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5",
    "⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
}  # fmt: skip
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_PARTS = {"half": "1/2", "third": "1/3", "two thirds": "2/3", "quarter": "1/4", "fourth": "1/4",
          "three quarters": "3/4", "three fourths": "3/4"}  # fmt: skip
_ROOT = re.compile(r"√\s?(?:(\d+(?:\.\d+)?|[A-Za-z])|\{([^{}]*)\}|\(([^()]*)\))")
_AND_A_PART = re.compile(
    r"(?<=\d) and (?:an? |one[- ])?"
    r"(half|third|two[- ]thirds|quarter|fourth|three[- ](?:quarters|fourths))(?![A-Za-z])",
    re.IGNORECASE,
)


def cleaned(text: str) -> str:
    """Return the text with ASCII signs, spaces, digits and exponents. What it means stays."""
    text = re.sub(r"(?<=\d)\\[,;:! ](?=\d{3}(?!\d))", " ", text)  # 12\,000
    text = text.replace("{,}", ",").replace("\\!", "")
    text = text.translate(_CHARACTERS)
    text = re.sub(r"[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^{" + m[0].translate(_RAISED) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_LOWERED) + "}", text)
    text = _AND_A_PART.sub(lambda m: f" {_PARTS[m[1].lower().replace('-', ' ')]}", text)
    text = _ROOT.sub(r"\\sqrt{\1\2\3}", text)
    text = re.sub(r"π|(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", text).replace("∞", "\\infty ")
    text = re.sub(r"(?:(\d)\s?)?([½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])", _spelled_fraction, text)
    text = re.sub(r"(?<![\d)}\]%])(\s|^)−\s*(?=[\d.$€£\\])", r"\1-", text).replace("−", "-")
    text = re.sub(r"(?:^|(?<=\s))–\s+|\s–(?=\s)|—", " — ", text)  # a dash between words
    return text.replace("–", "-")


def _spelled_fraction(match: "re.Match[str]") -> str:
    return f"{match[1]} {_VULGAR[match[2]]}" if match[1] else _VULGAR[match[2]]


def plain(text: str) -> str:
    r"""Return `cleaned` text without LaTeX's formatting: ``\text``, ``\left``, ``\$``, spaces."""
    text = _without_fonts(text)
    text = re.sub(
        r"\\(?:displaystyle|left|right|bigl?|bigr?|Bigl?|Bigr?|limits)(?![a-zA-Z])", "", text
    )
    text = re.sub(r"\\(?:quad|qquad|enspace|thinspace)(?![a-zA-Z])|\\[,;: ]|~(?=\w)", " ", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\(?:times|cdot)(?![a-zA-Z])|[×·]", "*", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])", "°", text)
    text = re.sub(r"\\infty(?![a-zA-Z])", "∞", text)
    text = re.sub(r"\\(?:euro|pounds)(?![a-zA-Z])", lambda m: "€" if "euro" in m[0] else "£", text)
    text = re.sub(r"\\([$%#&_])", r"\1", text)
    return re.sub(r"[ \t\r\n]+", " ", text).strip()


_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf)?|math(?:rm|bf|it|sf|tt)|mbox|hbox|operatorname|boldsymbol|bm)\s*\{"
)


def _without_fonts(text: str) -> str:
    for _ in range(20):
        match = _FONT.search(text)
        if match is None:
            break
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        inner = text[match.end() : end - (depth == 0)]
        text = f"{text[: match.start()]} {inner} {text[end:]}"
    return text


# --- Numbers --------------------------------------------------------------------------------------

_DECIMAL = r"(?:\d{1,3}(?: \d{3})+(?!\d)(?:[.,]\d+)?|\d(?:[\d,.']*\d)?|\.\d+)"
_FRAC = (
    r"\\frac\s*(?:\{\s*(?P<ftop>-?[\d,. ]+?)\s*\}|(?P<ftop1>\d))"
    r"\s*(?:\{\s*(?P<fbot>-?[\d,. ]+?)\s*\}|(?P<fbot1>\d))"
)
_TEN = r"10\s*\^\s*(?:\{\s*(?P<exp>[-+]?\d+)\s*\}|(?P<exp1>[-+]?\d+))"
_CURRENCY = r"(?:US\$|USD|EUR|GBP|JPY|INR|Rs\.?|[$€£¥₹])"
NUMBER = re.compile(
    rf"(?P<sign>[-+]\s?|(?:minus|negative)\s)?(?P<before>{_CURRENCY}(?![A-Za-z])\s?)?(?P<sign2>-)?"
    rf"(?:(?P<whole>\d+)\s*{_FRAC}"
    rf"|{_FRAC.replace('(?P<f', '(?P<g')}"
    rf"|(?P<mixed>\d+)(?: |\s*-\s*(?=\d/\d))(?P<mtop>\d+)\s?/\s?(?P<mbot>\d+)"
    rf"|(?P<top>{_DECIMAL})\s?/\s?(?P<bot>{_DECIMAL})(?!\s?/)"
    rf"|(?P<base>{_DECIMAL})\s?(?:\*|x)\s?{_TEN}"
    rf"|{_TEN.replace('(?P<e', '(?P<p')}"
    rf"|(?P<ebase>{_DECIMAL})[eE](?P<eexp>[-+]?\d+)"
    rf"|(?P<decimal>{_DECIMAL}))",
    re.IGNORECASE,
)
_CLOCK = re.compile(
    r"(?P<parts>\d{1,3}(?::\d{1,2}){1,2}|\d{1,2}(?=\s?[ap]\.?m\b))"
    r"(?:\s?(?P<half>[ap])\.?m\b\.?)?(?![\d:])",
    re.IGNORECASE,
)
_FACTORS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
            "trillion": 10**12, "dozen": 12, "k": 1000, "lakh": 10**5, "crore": 10**7,
            "tenth": Fraction(1, 10), "hundredth": Fraction(1, 100),
            "thousandth": Fraction(1, 1000), "halve": Fraction(1, 2)}  # fmt: skip
_FACTORS |= {
    name: Fraction(1, parts)
    for parts, name in enumerate(("third", "", "fifth", "sixth", "seventh", "eighth", "ninth"), 3)
    if name
}
_FACTOR = re.compile(
    r"\s?(hundred(?:th)?|thousand(?:th)?|tenth|million|billion|trillion|dozen|lakh|crore"
    r"|(?:halve|third|fifth|sixth|seventh|eighth|ninth)(?=s))s?\b|k\b",
    re.IGNORECASE,
)
_UNREAD = re.compile(
    r"\s*(?:[√∛‰′″]|factorial|choose|(?:square |cube )?root|sqrt|modulo|squared|cubed"
    r"|to the (?:power|\w+th)|r(?:emainder|em\.?)?\s?(?:of\s)?(?=\d)|(?:with (?:a )?)?remainder"
    r"|out of(?=\s+\d)|of(?=\s+\d)"
    r"|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|(?:twen|thir|for|fif|six"
    r"|seven|eigh|nine)ty)(?![A-Za-z])|\s[eE]\s?\d",
    re.IGNORECASE,
)
"""The number goes on in words or signs that are not read."""
_CONTINUES = re.compile(
    r"\s*(?:[*+/^×÷<>≤≥±!|]|=|-\s?[\d\\($A-Za-z]|—?\\(?!\)|\]|\s|%|text)"
    r"|\((?!(?<=\s\()(?!mod\b)[A-Za-z]{2,})"
    r"|(?:plus|minus|times|divided|multiplied|over|squared|cubed|mod|x)\b(?=\s+(?:by\s+)?[-$\d(\\]))"
)
"""The number is a part of a larger expression."""


def decimals(raw: str, *, strict: bool) -> list[tuple[Fraction, int]]:
    """Return the readings of digits with separators, each with its decimal places.

    A strict reading takes one that is written in two ways for none.
    """
    raw = raw.replace("'", ",") if re.fullmatch(r"\d{1,3}(?:'\d{3})+(?:\.\d+)?", raw) else raw
    if re.fullmatch(r"\d+(?:\.\d+)?|\.\d+", raw):
        return [_decimal(raw)]
    if re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|[1-9]\d{0,2}(?: \d{3})+(?:\.\d+)?", raw):
        return [_decimal(raw.replace(",", "").replace(" ", ""))]
    if re.fullmatch(r"[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?", raw):  # Indian grouping
        return [_decimal(raw.replace(",", ""))]
    if strict:
        return []
    if re.fullmatch(r"[1-9]\d{0,2}(?:\.\d{3})+,\d+|[1-9]\d{0,2}(?: \d{3})+,\d+", raw):
        return [_decimal(raw.replace(".", "").replace(" ", "").replace(",", "."))]
    if re.fullmatch(r"[1-9]\d{0,2}(?:\.\d{3}){2,}", raw):
        return [_decimal(raw.replace(".", ""))]
    if re.fullmatch(r"\d+,\d+", raw):
        return [_decimal(raw.replace(",", "."))]
    return []


def _decimal(text: str) -> tuple[Fraction, int]:
    return Fraction(text if text[0] != "." else "0" + text), len(text.partition(".")[2])


def read_prefix(text: str, *, strict: bool = False) -> tuple[list[Value], str] | None:
    """Return the readings of the number or time that a `plain` text begins with, and the rest.

    None: it begins with no number, or with one that is a part of an expression.
    """
    clock = _CLOCK.match(text)
    if clock:
        parts = tuple(int(part) for part in clock["parts"].split(":"))
        half = f"{clock['half'].lower()}m" if clock["half"] else None
        return [Clock(parts, half)], text[clock.end() :]
    match = NUMBER.match(text)
    if match is None:
        return None
    values = _values(match, strict=strict)
    rest = text[match.end() :]
    if re.match(
        r"[:/]\s?\d|[\d_]|['\"]|\.\d|(?:-|–)\d", rest
    ):  # a date, a version, feet and inches
        return [], rest
    if match["sign2"] and not match["before"]:  # --5
        return [], rest
    while factor := _FACTOR.match(rest):
        scale = _FACTORS[(factor[1] or "k").lower()]
        values = [(value * scale, 0) for value, _ in values]
        rest = rest[factor.end() :]
    ordinal = re.match(r"(?:st|nd|rd|th)\b", rest)
    if ordinal:
        rest = rest[ordinal.end() :]
    unit, rest = leading_unit(rest, strict=strict)
    unit = unit or (leading_unit(match["before"], strict=False)[0] if match["before"] else None)
    if below := re.match(r"\s*below zero\b", rest):
        values, rest = [(-value, places) for value, places in values], rest[below.end() :]
    if _UNREAD.match(rest):
        return [], rest
    if _CONTINUES.match(rest) or re.match(r"[A-Za-z]", rest):
        return None
    return [Number(value, unit, places) for value, places in values], rest


def _values(match: "re.Match[str]", *, strict: bool) -> list[tuple[Fraction, int]]:
    """Return the exact values that a match of `NUMBER` can have, with their decimal places."""
    group = match.groupdict()
    minus = [bool(sign) and sign[0].lower() in "-mn" for sign in (group["sign"], group["sign2"])]
    sign = -1 if minus[0] != minus[1] else 1
    found: list[tuple[Fraction, int]] = []
    if group["decimal"]:
        found = decimals(group["decimal"], strict=strict)
    elif group["mixed"]:
        found = _mixed(group["mixed"], group["mtop"], group["mbot"])
    elif group["whole"]:
        found = _mixed(group["whole"], _either(group, "ftop"), _either(group, "fbot"))
    elif group["top"] or _either(group, "gtop"):
        top, bottom = group["top"] or _either(group, "gtop"), group["bot"] or _either(group, "gbot")
        found = _quotient(top, bottom, strict=strict)
    else:
        exponent = int(_either(group, "exp") or _either(group, "pxp") or group["eexp"])
        base = group["base"] or group["ebase"]
        bases = decimals(base, strict=strict) if base else [(Fraction(1), 0)]
        if abs(exponent) <= _MAX_EXPONENT:
            found = [(value * Fraction(10) ** exponent, 0) for value, _ in bases]
    return [(sign * value, places) for value, places in found]


def _either(group: "dict[str, str | None]", name: str) -> str:
    return group[name] or group[f"{name}1"] or ""


def _mixed(whole: str, top: str, bottom: str) -> list[tuple[Fraction, int]]:
    if not (top.isdigit() and bottom.isdigit()) or not int(top) < int(bottom):
        return []
    return [(int(whole) + Fraction(int(top), int(bottom)), 0)]


def _quotient(top: str, bottom: str, *, strict: bool) -> list[tuple[Fraction, int]]:
    signs = top.startswith("-") != bottom.startswith("-")
    tops = decimals(top.lstrip("-"), strict=strict)
    bottoms = decimals(bottom.lstrip("-"), strict=strict)
    return [
        ((-1 if signs else 1) * first / second, 0)
        for first, _ in tops
        for second, _ in bottoms
        if second
    ]


# --- Whole texts ----------------------------------------------------------------------------------

_WRAPPED = re.compile(
    r"\$\$(.*)\$\$|\$([^$]*)\$|\\\((.*)\\\)|\\\[(.*)\\\]|\{([^{},]*)\}|\(([^(),]*)\)|`(.*)`|\"(.*)\"|“(.*)”"
    r"|\*\*(.*)\*\*|__(.*)__|\*(.*)\*|\\mathop\{(.*)\}"
)
_NAMED = re.compile(r"(?:[A-Za-z](?:_\{?\w+\}?)?|\\[a-z]+)\s*(?:=|\\in\b|∈)\s*")
_HEDGE = re.compile(
    r"(?:about|approximately|approx\.?|around|roughly|exactly|just|only|nearly|≈|~|\\approx\b|\\sim\b"
    r"|simply|thus|therefore|equal to|a total of|=|:)\s*",
    re.IGNORECASE,
)
_NOUN = re.compile(r"\s?[A-Za-z][A-Za-z'-]*(?: \(?[A-Za-z][A-Za-z'-]*\)?){0,5}\s?")
_NO_NOUN = re.compile(
    r"\b(?:or|and|to|than|not|least|most|less|more|between|mod|times|plus|minus|over|under|remainder"
    r"|r|of|is|are|point|half|thirds?|quarters?|percentage|squared|cubed|dividing|divided)\b",
    re.IGNORECASE,
)


def read(text: str, *, strict: bool = False) -> list[Value] | None:
    """Return the readings of a whole `plain` text.

    None: it is no plain number. Empty: it is one, or looks like one, and cannot be read.

    Args:
        strict: for references: no reading that a separator leaves open, no hedges.
    """
    if len(text) > _MAX_CHARS:
        return None
    text = unwrapped(text, strict=strict)
    listing = _listing(text, strict=strict)
    if listing is not None:
        return listing
    found = read_prefix(text, strict=strict)
    if found is None:
        return None
    values, rest = found
    rest = rest.strip().rstrip(".,;:" if strict else ".,;:!")
    if re.match(r"\d", rest):
        return []
    if rest and not (_NOUN.fullmatch(rest) and not _NO_NOUN.search(rest)):
        return None if values else []
    return values


def unwrapped(text: str, *, strict: bool) -> str:
    """Return a text without delimiters, quotes, emphasis, final punctuation, a name and ``=``."""
    before = None
    while before != text:
        before = text
        ends = ";" if text.endswith("..") else ".;?,:" if strict else ".;?,:!"
        text = text.strip().rstrip(ends).strip()
        match = _WRAPPED.fullmatch(text)
        if (match and not re.fullmatch(r"\{[^{}]*\}", text.replace("\\", ""))) or (
            match and match[5]
        ):
            text = next(group for group in match.groups() if group is not None)
        text = _NAMED.sub("", text, count=1) if _NAMED.match(text) else text
        if not strict and (hedge := _HEDGE.match(text)):
            text = text[hedge.end() :]
    return text


def _listing(text: str, *, strict: bool) -> list[Value] | None:
    bracketed = re.fullmatch(r"(\\?[{(\[])(.*?,.*?)(\\?[})\]])", text)
    if not bracketed:
        single = re.fullmatch(r"\\\{([^{},]*)\\\}", text)
        if single:
            items = _items([single[1]], strict=strict)
            return None if items is None else [Listing("{", "}", items)]
        return _bare_list(text, strict=strict)
    opening, closing = (bracketed[index].replace("\\", "") for index in (1, 3))
    if (opening == "{") != (closing == "}"):
        return None
    inner = bracketed[2]
    if opening == "(" and closing == ")" and re.fullmatch(r"\s*\d{1,3}(?:,\d{3})+\s*", inner):
        items = _items(inner.split(","), strict=strict)
        return [] if strict else [*_numbers(inner), *([Listing("(", ")", items)] if items else [])]
    items = _items(_split(inner), strict=strict)
    return None if items is None else [Listing(opening, closing, items)]


def _numbers(text: str) -> list[Value]:
    return [Number(value, None, places) for value, places in decimals(text.strip(), strict=False)]


def _bare_list(text: str, *, strict: bool) -> list[Value] | None:
    parts = re.split(r"\s*,\s+(?:and|or)\s+|\s+(?:and|or)\s+|\s*,\s+|\s*;\s*", text)
    if len(parts) > 1:
        items = _items(parts, strict=strict)
        units = {item.unit for item in items or () if isinstance(item, Number)}
        if strict and len(units) > 1:  # 10 dollars and 50 cents
            return []
        return None if items is None else [Listing("", "", items)]
    if re.fullmatch(r"-?\d+(?:,-?\d+)+", text) and not decimals(text.lstrip("-"), strict=True):
        if strict:
            return []
        items = _items(text.split(","), strict=False)
        numbers = read_prefix(text)
        return [*(numbers[0] if numbers else []), *([Listing("", "", items)] if items else [])]
    return None


def _split(inner: str) -> list[str]:
    """Split at commas; those of ``1,234`` count as separators of the list only without spaces."""
    return inner.split(", ") if ", " in inner else inner.split(",")


def _items(parts: list[str], *, strict: bool) -> tuple[Number | Infinity, ...] | None:
    items: list[Number | Infinity] = []
    for part in parts:
        part = unwrapped(part, strict=strict)
        if re.fullmatch(r"[-+]?\s?∞", part):
            items.append(Infinity(-1 if part.startswith("-") else 1))
            continue
        found = read_prefix(part, strict=strict)
        if found is None or found[1].strip() or len(found[0]) != 1:
            return None
        (value,) = found[0]
        if not isinstance(value, Number):
            return None
        items.append(value)
    return tuple(items)
