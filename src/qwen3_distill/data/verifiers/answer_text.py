r"""Finds the final answer that a response states.

A statement is the last of: a ``\boxed{}``, a line ``#### X``, a phrase "answer is X" or
"Answer: X". Without a statement the last sentence that holds a number or LaTeX counts, in it the
last bold number, else the last number.
"""

# ruff: noqa: RUF001 - look-alike signs are what is read

import re
from dataclasses import dataclass

from qwen3_distill.data.verifiers.number_text import NUMBER, cleaned, plain, read, read_prefix
from qwen3_distill.data.verifiers.number_values import Listing, Number, Value

MAX_RESPONSE_CHARS = 4000
"""Number of characters read at the end of a response: a final answer stands at the end."""
_MAX_STATED = 600
"""Number of characters of a statement or sentence that are read: searches are quadratic in it."""
_NEAR = 80
"""Number of characters before a number that can say what it is."""
BOXED = "\\boxed"
_JOINT = re.compile(r"[\s$]*(?:,|,?\s*(?:and|or))[\s$]*")
_MARK = re.compile(r"^[ \t>*_]*####[ \t]*(?!#)(\S[^\n]*)", re.MULTILINE)
_HEADING = re.compile(r"(?:\d+[.)]\s+)?\*{0,2}[A-Za-z][A-Za-z]+|\d+[.):]\s")
_PHRASE = re.compile(
    r"\banswers?\b(?:\s+(?:to|of|for)\s[^.:=\n]{0,80}?)?\**_*\s{0,3}"
    r"(?::|=|(?:\bis|\bare|would be|will be|must be|should be|equals)\b)\**_*[ \t]*:?[ \t]*"
    r"(?=([^\n]*)(?:\n+[ \t]*([^\n]*))?)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])[\"'*_)]*\s+(?=[A-Z*#$\\(\[])|\n+|(?<=[!?])\s+")
_CLOSING = re.compile(
    r"\b(?:i hope|hope (?:this|that|it)|let me know|feel free"
    r"|(?:any|more|further|other) questions|ask me"
    r"|(?:happy|glad) to help|good luck|best of luck|have a (?:nice|great|good) day)\b",
    re.IGNORECASE,
)
_BOLD = re.compile(r"(?<![\w*])(\*\*|__)(?=\S)([^\n]*?\S)\1(?![\w*])")
_MATH = re.compile(
    r"\$\$(.{1,600}?)\$\$|\\\[(.{1,600}?)\\\]|\\\((.{1,600}?)\\\)|(?<![\\$\w])\$"
    r"(?![\s$])([^$\n]*?[^\s\\$])\$(?!\d)",
    re.DOTALL,
)
_UNLIKE = re.compile(
    r"(?:\bnot|n't|\bcannot|\bnever|≠|\\neq?|\brather than|\binstead of|(?:more|less|greater|fewer"
    r"|larger|smaller|higher|lower) than|at least|at most|\bup to|\bover|\bunder|\bbelow|\babove"
    r"|\b(?:half|third|quarter|root|square|cube|reciprocal|negative|opposite) of"
    r"|\b(?:twice|double|triple|log|ln|sin|cos|tan|exp)\b"
    r"|\bbetween|[<>≤≥]|\\[lg]eq?)"
    r"\s*(?:(?:equal to|be|is|the|a|an|exactly)\s+)*[\s*_$\\(]*$",
    re.IGNORECASE,
)
_NOT = re.compile(r",?\s+(?:and\s+)?(?:not|rather than|instead of)\s(?:(?!but\b)[^,])*$")
_BRACKETS = re.compile(
    r"(?<![A-Za-z\d])(?:\\left\s?)?\\?[\[({][^\[\](){}\n]*,[^\[\](){}\n]*?(?:\\right\s?)?\\?[\])}]"
)
_VERB = re.compile(
    r"=|:|\b(?:is|are|get|gets|have|has|gives|give|equals|be|obtain|find|but)\b", re.IGNORECASE
)
_RANGE = re.compile(
    r"(?:\bbetween|\bfrom)\s[^.\n]*?\d[^.\n]{0,30}?\s(?:and|to)\s*[*_$]*$", re.IGNORECASE
)
_OR = re.compile(
    r"\d[^.\n\d]{0,30}?[\s(,]or\s+(?:(?:maybe|perhaps|possibly|even)\s+)?[^\d.\n=]{0,12}$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """A response's final answer: its readings as plain values, else text for math-verify.

    Both are None when the response states no answer; ``values`` is empty when it states one that
    is none, such as "18 or 19" in words or a malformed number.
    """

    values: list[Value] | None
    latex: str | None


def final_answer(response_text: str) -> Answer:
    """Find and read the final answer of a response."""
    tail = response_text[-MAX_RESPONSE_CHARS:]
    text = cleaned(tail.rpartition("</think>")[2]).replace("\\fbox", BOXED)
    text = re.sub(r"<answer>", "\nAnswer: ", text, flags=re.IGNORECASE)
    text = re.sub(r"</?[A-Za-z][\w-]*>", "\n", text)
    text = _MATH.sub(lambda match: match[0].replace("\n", " "), text)
    bare = unemphasised(text)
    statements = [*_boxes(bare), *_marks(bare), *_phrases(bare)]
    if statements:
        return max(statements, key=lambda item: item[0])[1]
    return _from_running_text(text)


def _boxes(text: str) -> list[tuple[int, Answer]]:
    if BOXED not in text:
        return []
    boxes = last_boxes(text)
    return [(len(text) - len(boxes), box_answer(boxes, strict=False))]


def box_answer(boxes: str, *, strict: bool) -> Answer:
    """Read a text that begins with a box, or with several that make one set."""
    contents, rest, last = [], boxes, ""
    while rest.startswith(BOXED):
        last, after = _content(rest)
        contents.append(last)
        joint = _JOINT.match(after)
        rest = after[joint.end() :] if joint else ""
    if len(contents) > 1:
        items = [read(plain(content), strict=strict) for content in contents]
        numbers = [value[0] for value in items if value and isinstance(value[0], Number)]
        if len(numbers) == len(contents):
            same = all(number.value == numbers[0].value for number in numbers)
            return Answer([numbers[0] if same else Listing("", "", tuple(numbers))], None)
        return Answer(None, boxes)
    short = plain(last)
    values = read(short, strict=strict) if last.strip() else []
    if values and last.rstrip().endswith("!"):  # a factorial
        values = None
    if values is None and not strict and re.search(r"(?<!\\)\b[A-Za-z]{2,} ", short):
        return _from_running_text(last)
    return Answer(values, boxes)


def _content(box: str) -> tuple[str, str]:
    """Return what stands in the box that a text begins with, and the text after it."""
    after = after_braces(box)
    if not after and not box.rstrip().endswith("}"):
        return "", ""
    whole = box[len(BOXED) : len(box) - len(after)].strip()
    return whole[1:-1] if whole.startswith("{") else "", after


def _marks(text: str) -> list[tuple[int, Answer]]:
    found: list[tuple[int, Answer]] = []
    for match in _MARK.finditer(text):
        line = match[1].strip()
        phrase = _PHRASE.match(line)
        if BOXED in line or (_HEADING.match(line) and not phrase):
            continue
        found.append((match.start(), _stated(phrase[1] if phrase else line)))
    return found


def _phrases(text: str) -> list[tuple[int, Answer]]:
    found = []
    for match in _PHRASE.finditer(text):
        stated = match[1].strip() or (match[2] or "").lstrip("# \t")
        sentence = _first_sentence(stated)
        if BOXED in stated or sentence.rstrip().endswith("?"):  # a question states nothing
            continue
        answer = _stated(sentence)
        if answer.values is not None or answer.latex is not None:
            found.append((match.start(), answer))
    return found


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])[\"'*_)]*\s+(?=[A-Z*#\\(])", text, maxsplit=1)[0]


def _stated(text: str) -> Answer:
    """Read an answer that a text begins with: a value, or LaTeX up to where words follow."""
    text = _NOT.sub("", text.strip()[:_MAX_STATED])
    math = _MATH.match(text)
    if math:
        body = next(group for group in math.groups() if group is not None)
        after = text[math.end() :]
        if not re.match(r"\s*(?:,|,?\s*(?:and|or))?\s*(?:\$|\\[(\[]|\d)", after):
            return _from_math(body, after)
    short = plain(text)
    values = read(short)
    if values is not None:
        return Answer(values, None)
    if "=" in short and not re.search(r"[A-Za-z]{3,}", plain(short.rpartition("=")[0])):
        return _stated(text.rpartition("=")[2])
    short = re.sub(
        r"^(?:about|approximately|approx\.?|around|roughly|exactly|just|only|[≈~$*_(]+(?!\d))\s*",
        "",
        short,
    )
    found = read_prefix(short)
    if found is not None:
        values, rest = found
        if re.match(r"[^.,;\d]{0,30}?,?\s*\(?\bor\b|\s*(?:to|and)\s+[-$]?\d", rest):
            return Answer([], None)
        return Answer(values, None)
    if math or re.match(r"\\[a-zA-Z]|[-+(\[{]*(?:\d|\\)|[A-Za-z](?![A-Za-z'])", text):
        return Answer(None, text if math else f"${text.rstrip('.,;!')}$")
    return Answer(None, None)


def _from_math(body: str, after: str) -> Answer:
    """Read LaTeX between delimiters, with the unit or factor after it."""
    whole = plain(f"{body} {_words_after(after)}")
    values = read(whole)
    if values is None and "=" in body and not re.search(r"[,;]", body):
        last = re.split(r"=|\\approx(?![a-zA-Z])", body)[-1]
        values = read(plain(f"{last} {_words_after(after)}"))
    return Answer(values, f"${body}$" + (" %" if re.match(r"\s*\\?%", after) else ""))


def _words_after(after: str) -> str:
    match = re.match(r"\s*\\?(?:[%°$€£]|[A-Za-z]+(?:\^?\d|/[a-z]+)?)", after)
    return match[0].strip() if match and read(f"1 {match[0].strip()}") else ""


def unemphasised(text: str) -> str:
    """Return a text without Markdown's bold, and without its code marks."""
    text = _BOLD.sub(r"\2", text)
    text = re.sub(r"(?<![\w*])\*(?=[^\s*])([^*\n]+)\*(?=[.,;:!?]*\s*$)", r"\1", text, flags=re.M)
    return re.sub(r"\*\*(?=[^\w\s]*\d|$)|(?<=[\d.%)])\*\*", "", text).replace("`", "")


# --- Without a statement --------------------------------------------------------------------------


def _from_running_text(text: str) -> Answer:
    sentences = [sentence for sentence in _SENTENCE.split(text) if sentence and sentence.strip()]
    while sentences and _CLOSING.search(sentences[-1]):
        sentences.pop()
    for sentence in reversed(sentences):
        if re.search(r"[\d∞]|\\[a-zA-Z(\[]|\$", sentence):
            return _from_sentence(sentence[-_MAX_STATED:])
    return Answer(None, None)


def _from_sentence(sentence: str) -> Answer:
    for bold in reversed(list(_BOLD.finditer(sentence))):
        values = read(plain(bold[2].rpartition("=")[2]))
        if values and not _UNLIKE.search(sentence[: bold.start()]):
            if _OR.search(sentence[: bold.start()]) or _RANGE.search(sentence[: bold.start()]):
                return Answer([], None)
            return Answer(values, None)
    sentence = unemphasised(sentence)
    if (values := _list_at_the_end(sentence)) is not None:
        return Answer(values, None)
    maths = list(_MATH.finditer(sentence))
    if maths and not re.search(r"\d", sentence[maths[-1].end() :]):
        body = next(group for group in maths[-1].groups() if group is not None)
        before = sentence[: maths[-1].start()]
        if _UNLIKE.search(before) or _OR.search(before) or _RANGE.search(before):
            return Answer([], None)
        return _from_math(body, sentence[maths[-1].end() :])
    if re.search(r"\\[a-zA-Z]", sentence) and not _PROSE.search(plain(sentence)):
        bare = sentence.rpartition("=")[2].strip().rstrip(".,;:!?")
        return Answer(read(plain(bare)), f"${bare}$")
    return _last_number(sentence)


def _list_at_the_end(sentence: str) -> list[Value] | None:
    """Read a sentence that ends with several values: in brackets, or after a verb or ``=``."""
    sentence = _NOT.sub("", sentence)
    brackets = list(_BRACKETS.finditer(sentence))
    if brackets and not re.search(r"\d", sentence[brackets[-1].end() :]):
        return read(plain(brackets[-1][0]))
    last = max((match.end() for match in _VERB.finditer(sentence)), default=0)
    values = read(plain(sentence[last:]))
    return values if values and any(isinstance(value, Listing) for value in values) else None


def _last_number(sentence: str) -> Answer:
    short = re.sub(r"^\s*[-*+]\s+", "", plain(sentence))
    # "160 minutes (2 hours and 40 minutes)" is 160.
    bare = re.sub(r"(?<=\S)\s\((?=[^()]*[A-Za-z])[^()]*\)(?=[\s.!]*$)", "", short)
    short = bare if re.search(r"\d", bare) else short
    equals = short.rfind("=")
    found: list[tuple[int, list[Value] | None]] = []
    position = 0
    while (match := _START.search(short, position)) is not None:
        start = match.start()
        near = short[max(0, start - _NEAR) : start]
        before = near.rstrip(" $€£(*_")
        prefix = read_prefix(short[start:])
        length = len(short) - start - len(prefix[1]) if prefix else _number_length(short, start)
        position = start + max(1, length)
        if _UNLIKE.search(near):
            continue
        operand = bool(re.search(r"(?:[*/^+×÷]|(?<=[\d)a-z])\s?-|\d\s*x)$", before))
        operand = operand or bool(re.search(r"\{\s*$|[A-Za-z]\($", near))
        found.append((start, None if prefix is None or operand else prefix[0]))
    if not found:
        return Answer([], None)
    after = [item for item in found if item[0] > equals >= 0]
    start, values = after[0] if after and "=" in short else found[-1]
    near = short[max(0, start - _NEAR) : start]
    if _OR.search(near) or _RANGE.search(near):
        return Answer([], None)
    if values is None:
        return Answer(None, _expression(short, start, equals) or sentence)
    return Answer(values, None)


_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?:\s|$)|(?<![\\A-Za-z])[A-Za-z]{3,}")
_RUN = re.compile(r"\S+(?:\s+(?:[-+*/^](?=\s)|\\[a-zA-Z])\s*\S*)*")
"""Words that operators or LaTeX join."""


def _expression(text: str, start: int, equals: int) -> str | None:
    """Return the expression that holds ``start`` as LaTeX; None if it is plain numbers."""
    rest = text[equals + 1 :]
    if not 0 <= equals < start or _WORD.search(rest):
        rest = next(match[0] for match in _RUN.finditer(text) if match.end() > start)
    rest = rest.strip(" .,;:!?*_")
    return f"${rest}$" if re.search(r"[A-Za-z\\^_]", rest) else None


_START = re.compile(
    r"(?<![A-Za-z\u00c0-\u024f\d_.,:/^\\])"
    r"(?:(?<![\d)\]}%])(?<![\d)\]}%]\s)[-+]\s?|\b(?:minus|negative) )?"
    r"(?:US\$|[$€£¥₹])?-?(?=\.?\d|\\frac)"
)


def _number_length(text: str, start: int) -> int:
    """Return the length of the number at ``start``, which is a part of an expression."""
    match = NUMBER.match(text, start)
    return match.end() - start if match else 1


# --- Boxes ----------------------------------------------------------------------------------------


def last_boxes(text: str) -> str:
    """Return the text from the last box on, or from the first of several that only ``,``, "and" or
    "or" separate.

    math-verify makes one set of all boxes in a text. An answer that is corrected later, or steps in
    boxes of their own, would then never equal the reference.
    """
    start = text.rindex(BOXED)
    while True:
        previous = text.rfind(BOXED, 0, start)
        if previous < 0 or not _JOINT.fullmatch(after_braces(text[previous:start])):
            return text[start:]
        start = previous


def after_braces(text: str) -> str:
    """Return the text after the first balanced ``{...}``; empty if it is never closed."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if character == "}" and depth == 0:
            return text[index + 1 :]
    return ""
