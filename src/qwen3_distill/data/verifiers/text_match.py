"""Judges answers as text: equal strings, the letter of a choice, a pattern's group."""

import re
from string import ascii_uppercase

from qwen3_distill.config import ChoiceVerifier, ExactVerifier, RegexVerifier
from qwen3_distill.data.sources import ANSWER_KEY, RawPrompt
from qwen3_distill.data.verifiers.answer_text import BOXED, MAX_RESPONSE_CHARS, last_boxes
from qwen3_distill.data.verifiers.base import task_value
from qwen3_distill.data.verifiers.line_process import LineProcess
from qwen3_distill.errors import DataError, EngineError
from qwen3_distill.types import Prompt

REGEX_TIMEOUT_S = 2.0
MAX_REGEX_CHARS = 100_000


class ExactTextVerifier:
    """Judges whether the whole response is the reference, as text."""

    def __init__(self, config: ExactVerifier) -> None:
        self._config = config

    def check(self, prompt: Prompt | RawPrompt) -> None:
        reference = task_value(prompt, ANSWER_KEY)
        if not reference.strip():
            raise DataError(f"prompt {prompt.prompt_id} has a blank reference answer; fill it")

    def correct(self, prompt: Prompt, response_text: str) -> bool:
        self.check(prompt)
        return self._normalised(response_text) == self._normalised(task_value(prompt, ANSWER_KEY))

    def _normalised(self, text: str) -> str:
        text = text.strip() if self._config.strip else text
        return text if self._config.case_sensitive else text.casefold()


# --- Multiple choice ------------------------------------------------------------------------------

_LETTER = (
    r"[*_(\[{$\s]*(?:\\(?:text|mathrm|mathbf|textbf)\s*\{\s*)?\(?([A-Za-z])(?![A-Za-z'\u2019])"
)
_STATED = re.compile(
    r"\b(?:answer|choice|option)s?\b(?:\s+(?:to|of|for)\s[^.:=\n]{0,80}?)?[*_]*\s{0,2}"
    r"(?::|=|\bis\b|would be|should be|must be)[*_]*\s{0,3}:?[ \t]*"
    rf"(?:(?:option|choice|letter|answer)\s+)?{_LETTER}(?!\s+[a-z])(?=(?P<more>[^\n]{{0,40}}))",
    re.IGNORECASE,
)
_MARKED = re.compile(
    rf"^[ \t>*_]*####[ \t]*{_LETTER}(?!\s+[a-z])(?=(?P<more>[^\n]{{0,40}}))", re.MULTILINE
)
_BOX = re.compile(rf"\\boxed\s*\{{\s*{_LETTER}(?=(?P<more>[^\n}}]{{0,40}}))")
_ALONE = re.compile(rf"^[ \t]*{_LETTER}[)\]}}*_$.:]*(?:\s[^\n]*)?$", re.MULTILINE)
_ANOTHER = re.compile(r"[)\]}*_$\s]*(?:,|/|&|\bor\b|\band\b)\s*[*_(\[{$\s]*[A-Z](?![A-Za-z])")


def chosen_letter(response_text: str) -> str | None:
    """Return the letter that a response chooses, in upper case; None if it chooses none or two.

    The last statement counts: a box, a line ``#### B``, "answer is B", "option: B". Without one, a
    response whose only line, or whose last line, begins with a letter that stands alone.
    """
    text = response_text[-MAX_RESPONSE_CHARS:].rpartition("</think>")[2]
    found = [*_STATED.finditer(text), *_MARKED.finditer(text)]
    if BOXED in text:
        start = len(text) - len(last_boxes(text))
        box = _BOX.match(text, start)
        if box is None and all(match.start() < start for match in found):
            return None
        found += [box] if box else []
    if found:
        last = max(found, key=lambda match: match.end())
        return None if _ANOTHER.match(last["more"]) else last[1].upper()
    lines = [line for line in text.strip().splitlines() if line.strip()]
    alone = _ALONE.match(lines[-1]) if lines else None
    if alone is None or _ANOTHER.match(lines[-1][alone.end(1) :]):
        return None
    # "A dog" is no choice; "A", "(A)", "A) a dog", "A. a dog" are.
    bare = re.fullmatch(r"[*_(\[{$\s]*[A-Za-z][)\]}*_$.:\s]*", lines[-1])
    marked = re.match(r"[*_\s]*(?:\([A-Za-z]\)|[A-Z][).:])", lines[-1])
    return alone[1].upper() if bare or marked else None


class ChoiceLetterVerifier:
    """Judges whether the response chooses the reference's letter."""

    def __init__(self, config: ChoiceVerifier) -> None:
        self._letters = ascii_uppercase[: config.options]

    def check(self, prompt: Prompt | RawPrompt) -> None:
        self._reference(prompt)

    def correct(self, prompt: Prompt, response_text: str) -> bool:
        return chosen_letter(response_text) == self._reference(prompt)

    def _reference(self, prompt: Prompt | RawPrompt) -> str:
        answer = task_value(prompt, ANSWER_KEY)
        match = re.fullmatch(r"\s*\(?([A-Za-z])[).:]?\s*", answer)
        if match is None or match[1].upper() not in self._letters:
            raise DataError(
                f"prompt {prompt.prompt_id} (numbered from 0): the reference answer {answer!r} is "
                f"not one of {', '.join(self._letters)}, expected a letter of verifier.options="
                f"{len(self._letters)} options; correct the data or change verifier.options"
            )
        return match[1].upper()


# --- Regular expressions --------------------------------------------------------------------------


class RegexGroupVerifier:
    """Judges what a pattern's group finds last in a response, in a process with a time limit.

    Thread-safe; calls take turns.
    """

    def __init__(self, config: RegexVerifier, timeout_s: float = REGEX_TIMEOUT_S) -> None:
        self._config, self._timeout_s = config, timeout_s
        self._worker = LineProcess(
            "function_process.py",
            ["regex", str(timeout_s)],
            "the process of the regex verifier ended with status {status} while starting (its "
            "error stands above)",
        )

    def check(self, prompt: Prompt | RawPrompt) -> None:
        if not task_value(prompt, ANSWER_KEY).strip():
            raise DataError(f"prompt {prompt.prompt_id} has a blank reference answer; fill it")

    def correct(self, prompt: Prompt, response_text: str) -> bool:
        self.check(prompt)
        found = self._worker.ask(
            {
                "pattern": self._config.pattern,
                "ignore_case": not self._config.case_sensitive,
                "text": response_text[-MAX_REGEX_CHARS:],
            }
        )
        if found is None:
            raise EngineError(
                f"prompt {prompt.prompt_id}: verifier.pattern={self._config.pattern!r} takes more "
                f"than {self._timeout_s:g} s on a response of {len(response_text)} characters, "
                "expected a match in a moment; write it without repetitions inside repetitions"
            )
        return self._same(found["value"], task_value(prompt, ANSWER_KEY))

    def _same(self, group: str | None, reference: str) -> bool:
        if group is None:
            return False
        if self._config.case_sensitive:
            return group.strip() == reference.strip()
        return group.strip().casefold() == reference.strip().casefold()
