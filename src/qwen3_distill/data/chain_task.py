"""Procedural task of the lab models: chained modular arithmetic with a scratchpad.

A problem is an expression such as ``17+5*3-8=``, evaluated strictly from left to right modulo a
small prime. The expected answer writes one equation per operator and then the result:
``17+5=3;3*3=9;9-8=1;#1`` (modulo 19). A wrong value anywhere changes every later line unless it
is repaired: ``3*3=5!3*3=9;`` takes the value 5 back and redoes the step.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "eval"]

STEP_MARK = ";"
ANSWER_MARK = "#"
CORRECTION_MARK = "!"

_FINAL_ANSWER = re.compile(r"[^#]*#(0|[1-9][0-9]*)")
_EXPRESSION = re.compile(r"(?:0|[1-9][0-9]*)(?:[-+*](?:0|[1-9][0-9]*))+=")
_TERM = re.compile(r"([-+*])([0-9]+)")


@dataclass(frozen=True)
class Problem:
    """One problem: a stable identifier, the user message, and the exact final answer."""

    problem_id: str
    text: str
    answer: str


@dataclass(frozen=True)
class Segment:
    """A part of a worked solution; `is_error` marks text that must not be imitated."""

    text: str
    is_error: bool = False


@dataclass(frozen=True, kw_only=True)
class ChainTask:
    """Chained arithmetic modulo `modulus`; the defaults are the task of the shipped lab models.

    Args:
        modulus: All values lie in ``0 .. modulus - 1``.
        min_operand: Smallest operand after an operator.
        max_operand: Largest operand after an operator.
        min_steps: Smallest number of operators in a problem.
        max_steps: Largest number of operators in a problem.
        operators: Characters out of ``+-*`` to draw operators from.
        error_rate: Probability that `solution_segments` writes a wrong value before the right
            one, drawn anew for every attempt at a step.
        max_errors_per_step: Upper bound on the wrong values in a row.
        eval_share: Share of all problem texts that belong to the evaluation split.
        seed: Chooses the sequence of problems, not the split they belong to.

    Raises:
        ValueError: If a parameter leaves no valid problem.
    """

    modulus: int = 19
    min_operand: int = 2
    max_operand: int = 9
    min_steps: int = 4
    max_steps: int = 6
    operators: str = "+-*"
    error_rate: float = 0.1
    max_errors_per_step: int = 2
    eval_share: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        if self.modulus < 3:
            raise ValueError(f"modulus must be at least 3, got {self.modulus}")
        if not 0 <= self.min_operand <= self.max_operand:
            raise ValueError(f"operand range is empty: {self.min_operand}..{self.max_operand}")
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"step range is empty: {self.min_steps}..{self.max_steps}")
        if not self.operators or set(self.operators) - set("+-*"):
            raise ValueError(f"operators must be drawn from '+-*', got {self.operators!r}")
        if not 0 <= self.error_rate <= 1:
            raise ValueError(f"error_rate must lie in 0..1, got {self.error_rate}")
        if self.max_errors_per_step < 0:
            raise ValueError(f"max_errors_per_step must be 0 or more: {self.max_errors_per_step}")
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share must lie strictly between 0 and 1, got {self.eval_share}")

    def problem(self, split: Split, index: int) -> Problem:
        """Return problem number `index` of a split.

        The result depends on the task's parameters, `split` and `index` only. Problems of
        different splits never share a text; two indices of one split may, at the rate of
        independent draws.

        Raises:
            ValueError: If `split` is unknown or `index` is negative.
        """
        return drawn_problem(
            split,
            index,
            seed=self.seed,
            eval_share=self.eval_share,
            draw=self._draw_text,
            answer=lambda text: str(self._steps(text)[-1][3]),
        )

    def split_of(self, text: str) -> Split:
        """Return the split that a problem text belongs to, for any seed of the task."""
        return split_of(text, self.eval_share)

    def solution_segments(
        self, problem: Problem, rng: random.Random | None = None
    ) -> list[Segment]:
        """Return a correct solution in pieces; with `rng`, one with errors that are then repaired.

        The wrong values are marked as errors.

        Raises:
            ValueError: If the problem's text is not an expression of this task.
        """
        segments: list[Segment] = []
        for left, operator, right, result in self._steps(problem.text):
            equation = f"{left}{operator}{right}="
            for wrong in self._wrong_values(result, rng):
                segments.append(Segment(equation))
                segments.append(Segment(str(wrong), is_error=True))
                segments.append(Segment(CORRECTION_MARK))
            segments.append(Segment(f"{equation}{result}{STEP_MARK}"))
        segments.append(Segment(f"{ANSWER_MARK}{problem.answer}"))
        return segments

    def check(self, problem: Problem, response_text: str) -> bool:
        """Return whether a response ends in the problem's exact answer.

        The response must contain a single ``#``, followed by the answer in plain decimal form
        and nothing else. The steps before it are not checked, so repaired errors are accepted.
        """
        match = _FINAL_ANSWER.fullmatch(response_text)
        return match is not None and match.group(1) == problem.answer

    def _draw_text(self, rng: random.Random) -> str:
        terms = [str(rng.randrange(self.modulus))]
        for _ in range(rng.randint(self.min_steps, self.max_steps)):
            terms.append(rng.choice(self.operators))
            terms.append(str(rng.randint(self.min_operand, self.max_operand)))
        return "".join(terms) + "="

    def _steps(self, text: str) -> list[tuple[int, str, int, int]]:
        """Evaluate an expression into (left, operator, right, result) rows."""
        if _EXPRESSION.fullmatch(text) is None:
            raise ValueError(f"not a chain expression: {text!r}")
        first = re.match(r"[0-9]+", text)
        assert first is not None
        value = int(first.group())
        steps = []
        for operator, operand in _TERM.findall(text):
            result = self._apply(value, operator, int(operand))
            steps.append((value, operator, int(operand), result))
            value = result
        return steps

    def _apply(self, left: int, operator: str, right: int) -> int:
        if operator == "+":
            return (left + right) % self.modulus
        if operator == "-":
            return (left - right) % self.modulus
        return (left * right) % self.modulus

    def _wrong_values(self, result: int, rng: random.Random | None) -> Iterator[int]:
        if rng is None:
            return
        for _ in range(self.max_errors_per_step):
            if rng.random() >= self.error_rate:
                return
            yield self._wrong_value(result, rng)

    def _wrong_value(self, result: int, rng: random.Random) -> int:
        # A wrong value that begins the right one (3 for 31) would teach the correction mark
        # at a point where the text so far is still right.
        while True:
            wrong = rng.randrange(self.modulus)
            if not str(result).startswith(str(wrong)):
                return wrong


def split_of(text: str, eval_share: float) -> Split:
    """Return the split that a problem's text belongs to; it depends on nothing else."""
    digest = hashlib.sha256(text.encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "eval" if share < eval_share else "train"


def drawn_problem(
    split: Split,
    index: int,
    *,
    seed: int,
    eval_share: float,
    draw: Callable[[random.Random], str],
    answer: Callable[[str], str],
) -> Problem:
    """Draw problem texts from a stream of ``split``, ``seed`` and ``index`` until one is of the
    split.

    Raises:
        ValueError: If ``split`` is unknown or ``index`` is negative.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}")
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}")
    rng = random.Random(f"{split}/{seed}/{index}")
    while True:
        text = draw(rng)
        if split_of(text, eval_share) == split:
            return Problem(problem_id=f"{split}-{seed}-{index}", text=text, answer=answer(text))
