"""Judges mathematical equality: plain values exactly, the rest by math-verify."""

from qwen3_distill.data.sources import ANSWER_KEY, RawPrompt
from qwen3_distill.data.verifiers.answer_text import final_answer
from qwen3_distill.data.verifiers.base import task_value
from qwen3_distill.data.verifiers.line_process import LineProcess
from qwen3_distill.data.verifiers.number_values import Clock, equal
from qwen3_distill.data.verifiers.reference_text import Reference, latex_of, read_reference
from qwen3_distill.errors import DataError
from qwen3_distill.types import Prompt

TIMEOUT_S = 5.0
MEMORY_BYTES = 4 * 2**30
LONGEST = 500
"""Characters by which an expression that math-verify is asked about may be longer than the
reference."""


class MathEqualityVerifier:
    r"""Judges mathematical equality with the reference (docs/guide/verifiers.md says what counts).

    Reference: the text after the last ``####`` (GSM8K), else the whole text; in it the last
    ``\boxed{}`` or ``$...$`` if there is one. Response: see `answer_text`. Where both are plain
    numbers, times or lists, they are compared exactly. Anything else goes to math-verify; what does
    not parse, or takes more than `TIMEOUT_S` or `MEMORY_BYTES`, is not correct, nor is what is more
    than `LONGEST` characters longer than the reference: text without an answer, read as a product
    of a hundred symbols, takes a tenth of a second.

    Thread-safe; calls take turns. The first call of math-verify starts a process (about 1 s).
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._worker = LineProcess(
            "math_process.py",
            [str(timeout_s), str(MEMORY_BYTES)],
            "the process of the math verifier ended with status {status} while starting (its error "
            "stands above), expected it to load math-verify; install math-verify or change "
            "verifier.kind",
        )
        self._references: dict[str, Reference] = {}

    def correct(self, prompt: Prompt, response_text: str) -> bool:
        reference = self._reference(prompt)
        answer = final_answer(response_text)
        if reference.value is not None and answer.values is not None:
            return any(equal(reference.value, value) for value in answer.values)
        response = answer.latex or (f"${latex_of(answer.values[0])}$" if answer.values else None)
        if response is None or isinstance(reference.value, Clock):
            return False
        if len(response) > LONGEST + len(reference.latex):
            return False
        question = {"reference": reference.latex, "response": response}
        return self._worker.ask(question) is True

    def check(self, prompt: Prompt | RawPrompt) -> None:
        self._reference(prompt)

    def _reference(self, prompt: Prompt | RawPrompt) -> Reference:
        answer = task_value(prompt, ANSWER_KEY)
        if answer not in self._references:
            reference = read_reference(answer)
            if reference is None or (
                reference.value is None
                and self._worker.ask({"reference": reference.latex}) is not True
            ):
                raise DataError(
                    f"prompt {prompt.prompt_id} (numbered from 0): the reference answer "
                    f"{answer!r} "
                    "is not a mathematical expression that can be read in one way only, expected a "
                    "number or LaTeX (a product of letters as a*b*c, 1.5 and not 1,5); correct the "
                    "data or change prompts.answer_field"
                )
            self._references[answer] = reference
        return self._references[answer]
