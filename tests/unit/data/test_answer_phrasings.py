"""Phrasings x numbers: which answers the math verifier takes for the reference, and which not."""

# ruff: noqa: RUF001 - look-alike signs are what is tested

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.config import MathVerifier
from qwen3_distill.data.verifiers import Verifier, build_verifier
from qwen3_distill.data.verifiers.answer_text import final_answer
from qwen3_distill.errors import DataError
from qwen3_distill.types import Prompt


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return build_verifier(MathVerifier(kind="math"))


def prompt(answer: str) -> Prompt:
    tokens = np.array([1], dtype=np.int32)
    return Prompt(prompt_id="p:0", token_ids=tokens, task_data={"answer": answer})


PHRASINGS = [
    "X",
    "The answer is X.",
    "the final answer is: X",
    "The answer to the question is X",
    "#### X",
    "#### **X**",
    "6 and 7 first.\n#### X\n\nI hope this helps! Ask me 2 more questions.",
    "There are 3 steps. **X**",
    "The total is **X**.",
    "The result is __X__",
    "**Answer: X**",
    "**Answer:** X",
    "**Final Answer**\n\nX",
    "### Answer:\nX",
    "Answer: X",
    "ANSWER: X!",
    "Answer = X",
    "2 apples, 5 pears. So x = X",
    "So we get X.\n\nLet me know if you have 2 more questions!",
    r"\boxed{X}",
    r"It is \boxed{X}, as 3 of 7 show.",
    r"$\boxed{X}$",
    r"\[ \boxed{X} \]",
    r"\boxed{\text{X}}",
    r"\boxed{\mathbf{X}}",
    r"\boxed{ X }.",
    r"First \boxed{77}, and then \boxed{X}.",
    r"\boxed{77} is the number of cups. The answer is X.",
    "$X$",
    r"So the value is \(X\).",
    r"\[ X \]",
    "<think>The answer is 77.</think>The answer is X",
    "The answer is X, not 77.",
    "It is X, not 77.",
    "It is not 77 but X.",
    "1. Add 5 and 6.\n2. Multiply by 2.\n\n**Result:** X",
    "The answer is about X",
    "`X`",
]

NUMBERS = [  # reference, spellings that state it
    ("18", ["18", "18.0", "18.00", "$18", r"\$18"]),
    ("18", ["18$", "£18", "18 €", "EUR 18", "18 USD", "US$18"]),
    ("18", ["18 dollars", "18 apples", "18 cm^2", "18 cm²"]),
    ("18", ["18cm", "18 km/h", "18%", r"18\%", "36/2"]),
    ("18", [r"18\text{ cm}", r"18^\circ", "18°", "18 degrees"]),
    ("18", ["18th", "+18", "(18)", r"\frac{36}{2}"]),
    ("-5", ["-5", "−5", "–5", "‐5", "﹣5", "-5.0", "-5°C", "-$5", "$-5", "minus 5", "−5 dollars"]),
    ("1234", ["1,234", "1234", "1 234", "1\u00a0234", "1\u2009234", "1\u202f234", r"1\,234"]),
    ("1234", ["1{,}234", "1,234.00", "$1,234"]),
    ("1234", ["1'234", "1.234e3", "1.234E+3", r"1.234 \times 10^3"]),
    ("#### 12,000", ["12000", "12 000", "12,000", "12 thousand", "12k", "1.2 × 10^4", "1.2·10⁴"]),
    ("1,234,567.5", ["1234567.5", "1.234.567,5", "1 234 567,5", "1 234 567.5"]),
    ("3/2", ["3/2", "1.5", "1,5", "1 1/2"]),
    ("3/2", ["1½", r"\frac{3}{2}", r"\frac32", r"\dfrac{3}{2}", "3 / 2"]),
    ("1.5", [r"1\frac{1}{2}", r"1 \frac{1}{2}", r"1\frac12", "1.50", "150%", "6/4", "1.5 hours"]),
    ("-1 1/2", ["-1.5", "-3/2", "−1½", r"-\frac{3}{2}", r"\frac{-3}{2}"]),
    ("0.5", ["0.5", ".5", "0.50", "1/2", "½", "50%", "50 percent", r"50\%"]),
    ("50%", ["50%", "50", "0.5", "1/2", "50 percent"]),
    ("1/3", ["1/3", r"\frac13", "2/6", "0.333333", "0.33333333"]),
    ("0.012", ["1.2e-2", r"1.2 \times 10^{-2}", "0.012", "1.2%", "1.2*10^-2"]),
    ("2.5 million", ["2500000", "2,500,000", "2.5 million", "$2.5 million", "2.5e6"]),
    ("18 cm^2", ["18", "18 cm^2", "18 cm²"]),
    ("18 cm^2", ["18 square centimeters", "18 sq cm", r"18\text{ cm}^2"]),
    ("5 km/h", ["5", "5 km/h", "5 kilometers per hour", "5 kph", r"5 \text{ km/h}"]),
    ("10 dollars", ["10", "$10", r"\$10", "10 dollars", "10.00 USD", "US$ 10"]),
    ("$5,000", ["5000", "$5,000", "5000 dollars", "5,000"]),
    ("3 hours", ["3", "3 hours", "3 h", "3.0 hrs"]),
    ("3:30", ["3:30", "3:30 PM", "3:30 p.m."]),
    ("3:30 PM", ["3:30 PM", "3:30", "15:30", "3:30pm"]),
    ("[1, 2)", ["[1, 2)", "[1,2)", r"\left[1, 2\right)", "[1.0, 4/2)"]),
    ("(1,2)", ["(1,2)", "(1, 2)", r"\left(1, 2\right)", "(1, 2.0)"]),
    (r"\{1, 2\}", [r"\{1, 2\}", r"\{2,1\}", "1, 2", "2 and 1", "1 or 2"]),
    (r"(-\infty, 3]", [r"(-\infty, 3]", "(-∞, 3]", r"\left(-\infty,3\right]"]),
    ("500000", ["5 hundred thousand", "5 lakh", "0.5 million"]),
    ("0.3", ["3 tenths", "30 hundredths", "300 thousandths"]),
    ("2.5", ["2 and a half", "5 halves", "2 and one half"]),
    ("-18", ["18 degrees below zero", "18 below zero"]),
]  # fmt: skip

WRONG = [  # reference, spellings that state something else
    ("18", ["19", "118", "181", "1.8", "-18", "−18"]),
    ("18", ["0.18", "18.5", "18,5", "1,800", "18 000", "180"]),
    ("18", ["1/18", "18/5", "18 1/2", "180%"]),
    ("18", ["18 thousand", "18k", "18e2", r"18 \times 10^2", "3:18"]),
    ("18", ["18 or 19", "18 and 19", "18, 19", "(18, 19)", "18:30"]),
    ("18", ["18-20", "2018", "A18", "x18", "18^2"]),
    ("18", [r"\sqrt{18}", r"\frac{18}{7}", "18.18.18"]),
    ("18", ["2018-05-18", "18 + 1", "18 * 2", "more than 18"]),
    ("18", ["not 18", "at least 18", "between 18 and 20"]),
    ("18", ["between 16 and 18", "less than 18", "", "eighteen?"]),
    ("-5", ["5", "+5", "3-5", "−−5", "-50", "-0.5"]),
    ("1234", ["1.234", "1,2345", "234", "1", "1 23", "12 34", "1,23", "123", "1.234,5"]),
    ("12 000", ["0", "12", "000", "12 0000", "1200", "24"]),
    ("1 1/2", ["1/2", "11/2", "1", "2", "1.2", "0.5", "1 1/3", "-1.5"]),
    ("0.5", ["50", "0.5%", "5", "-0.5", "0.05", "2", "1/5"]),
    ("50", ["0.5", "500%", "500", "5%", "-50%"]),
    ("50%", ["5", "50.5", "0.05", "5000", "1/50", "5%", "$50"]),
    ("1/3", ["0.33", "0.333334", "1/30", "3", "13", "1:3"]),
    ("18 cm^2", ["18 cm", "18 m^2", "18 cm^3", "81", "18 kg", "18 hours", "1.8 cm^2"]),
    ("5 km/h", ["5 m/s", "5 km", "5 h", "5 miles per hour", "50 km/h"]),
    ("$18", ["€18", "18 cents", "18 EUR", "18%", "1.8", "$1.80"]),
    ("3 hours", ["3 minutes", "180 minutes", "3:30", "30", "3 days"]),
    ("3:30", ["3", "30", "3.5", "4:30", "3:31", "13:30", "3/30", "0.1", "33:0"]),
    ("3:30 PM", ["3:30 AM", "3:31 PM", "13:30", "3 PM"]),
    ("[1, 2)", ["(1, 2)", "[1, 2]", "(1, 2]", "[1, 3)", "1, 2, 3", "1", "12"]),
    ("(1,2)", ["(2,1)", "[1,2]", r"\{1,2\}", "(1,2,3)", "1.2", "12", "(1,3)"]),
    (r"\{1, 2\}", ["1", r"\{1, 2, 3\}", r"\{1, 3\}", "12", "1.2", "(1, 2)"]),
    (r"(-\infty, 3]", [r"(\infty, 3]", r"(-\infty, 3)", "3", r"[-\infty, 3]"]),
    ("2.5 million", ["2.5", "25", "2.5 billion", "2.5 thousand"]),
    ("2", ["2π", "2 pi", r"2\pi", "2√3", r"2\sqrt{3}", "√2", "√(2)", "π/2", "2x", "2i", "2³"]),
    ("2", ["2 factorial", "2 squared", "2 to the power of 5", "2 choose 1", "2 sqrt(3)", "log 2"]),
    ("2", ["2 and a half", "2 thousand five hundred", "2 tenths", "2 fifths"]),
    ("2", ["2 hundred thousand", "2 lakh", "2‰", "2′", "half of 2", "twice 2", "sin 2"]),
    ("2", ["2 remainder 3", "2 R 3", "2 r3", "2 out of 5", "2 of 5", "2 with remainder 1"]),
    ("2", ["the square root of 2", "2 e5", "2.5 and a half", "never 2", "2 below zero"]),
]  # fmt: skip

REASONING = [  # reference, response, verdict: right and wrong numbers near each other
    ("18", "She makes 9 * 2 = 18 dollars.", True),
    ("9", "She makes 9 * 2 = 18 dollars.", False),
    ("2", "She makes 9 * 2 = 18 dollars.", False),
    ("18", "She makes $9 * $2 = $18 every 7 days.", True),
    ("7", "She makes $9 * $2 = $18 every 7 days.", False),
    ("18", "18 is close, but the answer is 19.", False),
    ("18", "The answer is 18. No, wait. The answer is 19.", False),
    ("19", "The answer is 18. No, wait. The answer is 19.", True),
    ("18", r"We get \boxed{18} at first. Then \boxed{19}.", False),
    ("18", r"\boxed{18} or \boxed{19}", False),
    ("18", r"\boxed{18}, then the answer is 20.", False),
    ("18", "#### 18\n#### 19", False),
    ("18", "#### Step 18: add\nThe sum is 20.", False),
    ("20", "#### Step 1: add 18\nThe sum is 20.", True),
    ("20", "#### 1. Add\nThe sum is 20.\n", True),
    ("18", "The answer is 18? No, it is 19.", False),
    ("19", "The answer is 18? No, it is 19.", True),
    ("18", "The answer is not 18.", False),
    ("18", "It isn't 18.", False),
    ("18", "It is 17, not 18.", False),
    ("17", "It is 17, not 18.", True),
    ("18", "It is either 18 or 19 dollars.", False),
    ("19", "It is either 18 or 19 dollars.", False),
    ("19", "The result is 18 apples or maybe 19.", False),
    ("18", "The number lies between 16 and 18.", False),
    ("18", "It costs more than 18 dollars.", False),
    ("18", "The answer is 18 because 6 * 3 = 18.", True),
    ("3", "The answer is 18 because 6 * 3 = 18.", False),
    ("18", "The answer is 20 because 6 * 3 = 18 and 18 + 2 = 20.", False),
    ("18", "- apples: 6\n- pears: 12\n- together: 18", True),
    ("-18", "Together:\n- 18 apples", False),
    ("18", "Together:\n- 18 apples", True),
    ("18", "She had 18 apples. She gave 5 away.", False),
    ("18", r"So $x = 18$.", True),
    ("18", r"So $2x = 36$ and hence $x = 18$ for 2 of them.", True),
    ("18", r"\[ 6 \cdot 3 = 18 \]", True),
    ("6", r"\[ 6 \cdot 3 = 18 \]", False),
    ("18", r"\boxed{6 \cdot 3}", True),
    ("18", r"\boxed{6 \cdot 4}", False),
    ("18", r"\boxed{x = 18}", True),
    ("18", r"\boxed{\text{The total is } 18}", True),
    ("18", r"\boxed{\frac{\frac{36}{1}}{2}}", True),
    ("18", r"\boxed{18", False),
    ("18", "The answer is 18 and I am 99% sure.", True),
    ("99", "The answer is 18 and I am 99% sure.", False),
    ("18", "The answer is\n\n18", True),
    ("160", "It takes 160 minutes (2 hours and 40 minutes).", True),
    ("40", "It takes 160 minutes (2 hours and 40 minutes).", False),
    ("18", "Of 3 and 6: <answer>18</answer> 2 checks", True),
    ("18", "<answer>19</answer> and not 18", False),
    ("18", "答案是18。", True),
    ("18", "So it is *18*.", True),
    ("18", r"\fbox{18}", True),
    ("3!", r"\boxed{6}", True),
    ("3!", r"\boxed{3}", False),
    ("3", r"\boxed{3!}", False),
    ("6", r"\boxed{3!}", True),
    ("70000", "Profit = $200,000 - $130,000 = **$70,000**", True),
    ("130000", "Profit = $200,000 - $130,000 = **$70,000**", False),
    ("64", r"The total cost is $8 \times 8 = 64$ dollars.", True),
    ("18", r"\boxed{18\,\mathrm{cm}^2}", True),
    ("18", r"\boxed{18 \text{ cm}^{2}}", True),
    (r"(-\infty, 2] \cup [3, \infty)", r"\boxed{(-\infty, 2] \cup [3, \infty)}", True),
    (r"(-\infty, 2] \cup [3, \infty)", r"\boxed{(-\infty, 2) \cup [3, \infty)}", False),
    ("19", "The total is **18 + 1**.", True),
    ("18", "The total is **18 + 1**.", False),
    ("18", "The answer is: \\[ 18 \\]", True),
    ("18", "Final answer: $18$ apples", True),
    ("18", "**18** apples are left after 2 days.", True),
    ("2", "**18** apples are left after 2 days.", False),
    ("x", "The answer is $x$", True),
    (r"\sqrt{2}", r"The answer is $\sqrt{2}$.", True),
    (r"\sqrt{2}", r"The answer is **\(\sqrt{2}\)**.", True),
    (r"\sqrt{4}", "The answer is 2.", True),
    (r"\sqrt{4}", "The answer is **3**.", False),
    (r"2\sqrt{3}", r"#### $2\sqrt{3}$", True),
    (r"2\sqrt{3}", r"#### $3\sqrt{2}$", False),
    ("3", "10 - 7 = 3 people", True),
    ("5", "It is 8 - 3", True),
    ("3", "It is 8 - 3", False),
    ("-3", "It is 8 - 3", False),
    ("72", "Thus the answer is\n\\[\n72\n\\]", True),
    ("73", "Thus the answer is\n\\[\n72\n\\]", False),
    (r"\frac{3}{4}", "The final answer is\n$$\n\\dfrac{3}{4}.\n$$", True),
    ("10", "The answer is 10 (ten).", True),
    ("10", "The answer is 10 (not 11).", True),
    ("11", "The answer is 10 (not 11).", False),
    ("10", "The answer is 10 (x + 1).", False),
    (r"\sqrt{2}", "The answer is √2.", True),
    (r"\sqrt{2}", r"\boxed{√2}", True),
    (r"2\sqrt{3}", "So we get 2√3 cm.", True),
    (r"3\sqrt{2}", "So we get 2√3 cm.", False),
    (r"2\pi", "The answer is 2π.", True),
    (r"2\pi", "It is 2 pi", True),
    (r"\frac{\pi}{2}", "π/2", True),
    (r"\frac{\pi}{2}", r"\frac{\pi}{2}", True),
    ("π", r"\boxed{\pi}", True),
    ("pi", r"\boxed{ip}", False),
    ("2x+3", "So f(x) = 2x + 3.", True),
    ("3", "So f(x) = 2x + 3.", False),
    ("18", "36 is twice 18.", False),
    ("36", "36 is twice 18.", True),
    ("2", "So x = 2 * \\sqrt{3}.", False),
]  # fmt: skip


def test_every_phrasing_of_every_number_is_read(verifier: Verifier) -> None:
    wrong = [
        (reference, phrasing.replace("X", spelling))
        for reference, spellings in NUMBERS
        for spelling in spellings
        for phrasing in PHRASINGS
        if not (phrasing == "$X$" and "$" in spelling)  # both would mean currency
        and verifier.correct(prompt(reference), phrasing.replace("X", spelling)) is not True
    ]
    assert wrong == []


def test_no_phrasing_of_another_number_is_right(verifier: Verifier) -> None:
    wrong = [
        (reference, phrasing.replace("X", spelling))
        for reference, spellings in WRONG
        for spelling in spellings
        for phrasing in PHRASINGS
        if verifier.correct(prompt(reference), phrasing.replace("X", spelling)) is not False
    ]
    assert wrong == []


@pytest.mark.parametrize(("reference", "response", "verdict"), REASONING)
def test_numbers_near_the_answer(
    verifier: Verifier, reference: str, response: str, verdict: bool
) -> None:
    assert verifier.correct(prompt(reference), response) is verdict


REFUSED = [
    "2 hours 30 minutes", "10 dollars and 50 cents", "6 feet 2 inches",
    "12 00", "12 0000", "1 23", "1,23", "1,5", "1,2345", "1.234,5", "1.234.567", "0,500",
    "1 234,5",
    "3-5", "3 - 5", "2024-05-18", "5/18/2024", "192.168.0.1", "5'3\"", "5 ft 3 in", "1 5/3",
    "18 or so", "about 18", "18?", "between 3 and 5", "$18 or so$", "18 19 20",
    "No", "yes", "Paris", "18 of 20", "half", "1e999999", "1/0", "(1,234)", "12 x 3", "5 R 2",
    "18 \u00a0 19", r"\boxed{1,5}", r"\boxed{12 00}", "#### 12 00", "$12 00$", "9" * 5000,
    "0x10", "0b101", "2x3", "1.2 e3", "3d5", "2h30m", "15h30", "A1", "v1.2", "1/3 (0.333)",
    "0.333...", "3.14…", "5..", "N/A", "n/a", "inf", "-infinity", "NaN", "null",
    "5 factorial", "2 thousand five hundred", "5 five", "2 squared", "5 choose 2",
    "1..5", "--5",
]  # fmt: skip


@pytest.mark.parametrize("reference", REFUSED)
def test_a_reference_that_may_mean_several_things_is_refused(
    verifier: Verifier, reference: str
) -> None:
    with pytest.raises(DataError, match=r"p:0 .* read in one way only, .* correct the data"):
        verifier.correct(prompt(reference), "18")


def grouped(value: int, separator: str) -> str:
    return f"{value:,}".replace(",", separator)


SPELLINGS: list[Callable[[int], str]] = [
    str,
    lambda n: grouped(n, ","),
    lambda n: grouped(n, " "),
    lambda n: grouped(n, "\u00a0"),
    lambda n: grouped(n, r"\,"),
    lambda n: str(n).replace("-", "−"),
    lambda n: f"{n}.0",
    lambda n: f"{n} apples",
    lambda n: f"{n}€",
    lambda n: f"{2 * n}/2",
    lambda n: rf"\frac{{{3 * n}}}{{3}}",
    lambda n: rf"{n} \times 10^0",
    lambda n: f"{n}e0",
]
REFERENCES: list[Callable[[int], str]] = [
    str,
    lambda n: f"Some steps, 2 + 2 = 4.\n#### {n:,}",
    lambda n: f"${n}$",
    lambda n: rf"\boxed{{{n}}}",
    lambda n: f"{n} widgets",
]


@given(
    value=st.integers(-(10**9), 10**9) | st.integers(-20, 20),
    other=st.integers(-(10**9), 10**9) | st.integers(-20, 20),
    spelled=st.sampled_from(SPELLINGS),
    phrasing=st.sampled_from(PHRASINGS),
    referred=st.sampled_from(REFERENCES),
)
@settings(max_examples=150, deadline=None)
def test_a_number_in_any_phrasing_is_read_and_another_one_is_wrong(
    verifier: Verifier,
    value: int,
    other: int,
    spelled: Callable[[int], str],
    phrasing: str,
    referred: Callable[[int], str],
) -> None:
    reference = prompt(referred(value))
    assert verifier.correct(reference, phrasing.replace("X", spelled(value))) is True
    if other != value:
        assert verifier.correct(reference, phrasing.replace("X", spelled(other))) is False


@given(
    top=st.integers(-200, 200),
    bottom=st.integers(1, 60),
    other=st.integers(-200, 200),
    phrasing=st.sampled_from(PHRASINGS),
    form=st.sampled_from(["{}/{}", r"\frac{{{}}}{{{}}}", r"$\frac{{{}}}{{{}}}$", "{} / {} hours"]),
)
@settings(max_examples=80, deadline=None)
def test_fractions_are_compared_exactly(
    verifier: Verifier, top: int, bottom: int, other: int, phrasing: str, form: str
) -> None:
    if "$" in phrasing and "$" in form:
        return
    right = verifier.correct(
        prompt(f"{top}/{bottom}"), phrasing.replace("X", form.format(other, bottom))
    )
    assert right is (top == other)


@given(text=st.text("0123456789 ,.'/:-()[]{}$%\\^*=#\nabenotrs", max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_text_is_an_error_or_a_wrong_reference(verifier: Verifier, text: str) -> None:
    assert verifier.correct(prompt("31415926"), text) is False
    try:
        verifier.check(prompt(text))
    except DataError:
        return


@pytest.mark.parametrize(
    "unit", ["1 ", "$1 ", "1-", "(1,", r"\text{", "1 or ", "**", r"\( 1 ", "⅓ "]
)
def test_a_degenerate_response_is_read_in_a_moment(verifier: Verifier, unit: str) -> None:
    start = time.process_time()
    final_answer(unit * 4000)
    assert time.process_time() - start < 1
