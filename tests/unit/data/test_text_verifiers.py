"""Exact text, multiple choice, and patterns."""

import time
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from qwen3_distill.config import ChoiceVerifier, ExactVerifier, RegexVerifier
from qwen3_distill.data.verifiers import build_verifier
from qwen3_distill.data.verifiers.text_match import RegexGroupVerifier, chosen_letter
from qwen3_distill.errors import DataError, EngineError
from qwen3_distill.types import Prompt


def prompt(answer: str) -> Prompt:
    tokens = np.array([1], dtype=np.int32)
    return Prompt(prompt_id="p:3", token_ids=tokens, task_data={"answer": answer})


@pytest.mark.parametrize(
    ("settings", "reference", "response", "verdict"),
    [
        ({}, "Paris", "Paris", True),
        ({}, "Paris", "  Paris\n", True),
        ({}, " Paris ", "Paris", True),
        ({}, "Paris", "paris", False),
        ({}, "Paris", "Paris.", False),
        ({}, "Paris", "It is Paris", False),
        ({}, "Paris", "", False),
        ({"strip": False}, "Paris", "Paris", True),
        ({"strip": False}, "Paris", "Paris\n", False),
        ({"case_sensitive": False}, "Straße", "STRASSE ", True),
        ({"case_sensitive": False}, "Paris", "pari", False),
    ],
)
def test_exact_text(settings: dict[str, Any], reference: str, response: str, verdict: bool) -> None:
    verifier = build_verifier(ExactVerifier(kind="exact", **settings))
    assert verifier.correct(prompt(reference), response) is verdict


@pytest.mark.parametrize(
    "response",
    [
        "B", "b", "(B)", "B.", "B)", "**B**", "B) a dog", "(B) a dog", "B: a dog", "Answer: B",
        "**Answer: B**", "**Answer:** B", "Answer: (B) a dog", "The answer is B.", "answer is (B)",
        "The correct answer is **B**, not C.", "The correct option is B", "#### B", "#### (B)",
        r"\boxed{B}", r"$\boxed{\text{B}}$", r"\boxed{(B)}", r"\boxed{\textbf{(B)}}",
        r"\boxed{A}. No, \boxed{B}", "A is wrong and C too.\n\nB", "A) no\nB) yes\n\nAnswer: B",
        "The answer is A. No: the answer is B.", "<think>Answer: A</think>\nB",
        "The answer is option B", r"\boxed{B. \text{a dog}}", "Final answer:\nB",
    ],
)  # fmt: skip
def test_the_chosen_letter_is_read(response: str) -> None:
    verifier = build_verifier(ChoiceVerifier(kind="choice"))
    assert chosen_letter(response) == "B"
    assert verifier.correct(prompt("B"), response) is True
    assert verifier.correct(prompt("(b)"), response) is True
    assert verifier.correct(prompt("A"), response) is False


@pytest.mark.parametrize(
    "response",
    [
        "", "A dog", "A bee is an insect.", "The answer is a dog.", "I think so", "Because",
        "B or C",
        "Answer: A or B", "The answer is B, C", r"\boxed{A, B}", r"\boxed{}", r"\boxed{42}",
        "The answer is Berlin", "Answer: none", "It is between A and B", "B and C", "ABC",
        "(A)/(B)",
        r"\boxed{BC}",
    ],
)  # fmt: skip
def test_a_response_without_one_choice_is_wrong(response: str) -> None:
    assert chosen_letter(response) is None
    verifier = build_verifier(ChoiceVerifier(kind="choice"))
    assert not any(verifier.correct(prompt(letter), response) for letter in "ABCD")


@pytest.mark.parametrize(
    ("options", "reference"), [(4, "E"), (2, "C"), (4, "AB"), (4, "1"), (4, "the dog"), (26, "")]
)
def test_a_reference_that_is_no_option_is_refused(options: int, reference: str) -> None:
    verifier = build_verifier(ChoiceVerifier(kind="choice", options=options))
    with pytest.raises(DataError, match=r"p:3 .* expected a letter of verifier.options"):
        verifier.check(prompt(reference))


def test_letters_beyond_the_options_are_wrong_and_26_are_possible() -> None:
    assert build_verifier(ChoiceVerifier(kind="choice", options=26)).correct(prompt("Z"), "(Z)")
    assert not build_verifier(ChoiceVerifier(kind="choice")).correct(prompt("D"), "(Z)")


@pytest.mark.parametrize(
    ("settings", "reference", "response", "verdict"),
    [
        ({"pattern": r"city: (\w+)"}, "Paris", "city: Rome, city: Paris.", True),
        ({"pattern": r"city: (\w+)"}, "Rome", "city: Rome, city: Paris.", False),
        ({"pattern": r"city: (\w+)"}, "Paris", "Paris", False),
        ({"pattern": r"city: (\w+)"}, "Paris", "CITY: paris", False),
        ({"pattern": r"city: (\w+)", "case_sensitive": False}, "Paris", "CITY: paris", True),
        ({"pattern": r"<a>(.*?)</a>"}, "1 2", "<a> 1 2 </a>", True),
        ({"pattern": r"(?:a|b)=(\d+)"}, "3", "a=3", True),
        ({"pattern": r"x(y)?"}, "y", "x", False),
    ],
)
def test_the_patterns_group_is_compared(
    settings: dict[str, Any], reference: str, response: str, verdict: bool
) -> None:
    verifier = build_verifier(RegexVerifier(kind="regex", **settings))
    assert verifier.correct(prompt(reference), response) is verdict


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "is no regular expression"),
        ("(a", "is no regular expression"),
        ("*", "is no regular expression"),
        ("a", "has 0 groups, expected one"),
        ("(a)(b)", "has 2 groups, expected one"),
    ],
)
def test_a_bad_pattern_is_refused_in_the_config(pattern: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RegexVerifier(kind="regex", pattern=pattern)


def test_a_pattern_that_backtracks_for_ever_is_an_error_with_the_row() -> None:
    verifier = RegexGroupVerifier(RegexVerifier(kind="regex", pattern=r"((?:a+)+)$"), timeout_s=2)
    assert verifier.correct(prompt("aa"), "aa") is True
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"p:3: verifier.pattern=.* more than 2 s"):
        verifier.correct(prompt("aa"), "a" * 40 + "b")
    assert time.monotonic() - start < 30
    assert verifier.correct(prompt("aa"), "aa") is True, "the next answer is judged"
