"""Procedural tasks on decimal numbers: a product with written-out steps, and a plain sum.

Both are tasks of the cost comparison (docs/evidence/protocol.md): in the product an early mistake
spoils all that follows; the sum is answered at once, in four or five tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from qwen3_distill.data.chain_task import (
    ANSWER_MARK,
    STEP_MARK,
    Problem,
    Segment,
    Split,
    drawn_problem,
)

PRODUCT_MARK = "m"
SUM_MARK = "s"


@dataclass(frozen=True, kw_only=True)
class MultiplyTask:
    """Products such as ``m347*26=``, worked out digit by digit with every carry.

    The answer has a line per digit of the second factor and one for their sum, lowest digits
    first. A step is ``digit*digit+carry=two digits``, or ``digit+digit+carry=two digits``:
    ``7*6+0=42;4*6+4=28;3*6+2=20;>2082;`` and so on, then ``#9022``.
    """

    first_digits: int = 3
    second_digits: int = 2
    eval_share: float = 0.125
    seed: int = 0

    def problem(self, split: Split, index: int) -> Problem:
        """Return problem number `index` of a split; the splits never share a text."""
        return drawn_problem(
            split,
            index,
            seed=self.seed,
            eval_share=self.eval_share,
            draw=self._draw_text,
            answer=lambda text: str(self._product(text)),
        )

    def solution_segments(
        self, problem: Problem, rng: random.Random | None = None
    ) -> list[Segment]:
        """Return the worked solution; errors are never written, so `rng` changes nothing."""
        first, second = self._factors(problem.text)
        width = self.first_digits + self.second_digits
        text, partials = "", []
        for place, digit in enumerate(reversed(second)):
            line, partial = _times_digit(first, int(digit))
            partials.append((partial + "0" * place).zfill(width))
            text += f"{line}>{partial}{STEP_MARK}"
        total = partials[0]
        for partial in partials[1:]:
            line, total = _column_sum(total, partial)
            text += f"{line}>{total}{STEP_MARK}"
        return [Segment(f"{text}{ANSWER_MARK}{problem.answer}")]

    def check(self, problem: Problem, response_text: str) -> bool:
        """Return whether a response has one ``#``, followed by the product and nothing else."""
        _, _, answer = response_text.partition(ANSWER_MARK)
        return answer == problem.answer

    def _draw_text(self, rng: random.Random) -> str:
        return (
            f"{PRODUCT_MARK}{_number(rng, self.first_digits)}*{_number(rng, self.second_digits)}="
        )

    def _factors(self, text: str) -> tuple[str, str]:
        first, _, second = text.removeprefix(PRODUCT_MARK).removesuffix("=").partition("*")
        return first, second

    def _product(self, text: str) -> int:
        first, second = self._factors(text)
        return int(first) * int(second)


@dataclass(frozen=True, kw_only=True)
class SumTask:
    """Sums such as ``s482+937=``, answered at once: ``1419``."""

    digits: int = 3
    eval_share: float = 0.125
    seed: int = 0

    def problem(self, split: Split, index: int) -> Problem:
        """Return problem number `index` of a split; the splits never share a text."""
        return drawn_problem(
            split,
            index,
            seed=self.seed,
            eval_share=self.eval_share,
            draw=lambda rng: f"{SUM_MARK}{_number(rng, self.digits)}+{_number(rng, self.digits)}=",
            answer=_sum_of,
        )

    def solution_segments(
        self, problem: Problem, rng: random.Random | None = None
    ) -> list[Segment]:
        """Return the answer, which is the whole solution."""
        return [Segment(problem.answer)]

    def check(self, problem: Problem, response_text: str) -> bool:
        """Return whether a response is the sum and nothing else."""
        return response_text == problem.answer


def _sum_of(text: str) -> str:
    first, _, second = text.removeprefix(SUM_MARK).removesuffix("=").partition("+")
    return str(int(first) + int(second))


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _times_digit(number: str, digit: int) -> tuple[str, str]:
    """Multiply by one digit; return the written steps and the product, with a leading carry."""
    steps, product, carry = "", "", 0
    for each in reversed(number):
        value = int(each) * digit + carry
        steps += f"{each}*{digit}+{carry}={value:02d}{STEP_MARK}"
        carry, low = divmod(value, 10)
        product = f"{low}{product}"
    return steps, f"{carry}{product}"


def _column_sum(first: str, second: str) -> tuple[str, str]:
    """Add two numbers of one width; return the written steps and the sum, in the same width."""
    steps, total, carry = "", "", 0
    for a, b in zip(reversed(first), reversed(second), strict=True):
        value = int(a) + int(b) + carry
        steps += f"{a}+{b}+{carry}={value:02d}{STEP_MARK}"
        carry, low = divmod(value, 10)
        total = f"{low}{total}"
    return steps, total
