"""Verifiers judge answers: exactly for procedural tasks, by mathematical equality otherwise."""

import json
import re
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from qwen3_distill.config import TaskVerifier, VerifierConfig
from qwen3_distill.data.chain_task import ChainTask, Problem
from qwen3_distill.data.sources import ANSWER_KEY, PROBLEM_KEY, PromptSource, RawPrompt
from qwen3_distill.errors import DataError, EngineError
from qwen3_distill.types import Prompt

FINAL_ANSWER_MARK = "####"
"""GSM8K's mark before the final answer."""
MAX_RESPONSE_CHARS = 4000
"""Number of characters parsed at the end of a response: parsing time grows faster than length, and
a final answer stands at the end."""
TIMEOUT_S = 5.0
MEMORY_BYTES = 4 * 2**30
_BOXED = "\\boxed"
_JOINT = re.compile(r"[\s$]*(?:,|,?\s*(?:and|or))[\s$]*")


class Verifier(Protocol):
    """Judges responses. The text is decoded without special tokens."""

    def check(self, prompt: Prompt | RawPrompt) -> None:
        """Check that responses to the prompt can be judged.

        Raises:
            DataError: the prompt has no usable reference answer.
        """
        ...

    def correct(self, prompt: Prompt, response_text: str) -> bool:
        """Return whether the response's final answer is right. No response makes it raise.

        Raises:
            DataError: the prompt has no usable reference answer.
        """
        ...


def build_verifier(config: VerifierConfig) -> Verifier:
    """Build the verifier that ``config`` describes."""
    if isinstance(config, TaskVerifier):
        return ChainVerifier(ChainTask())
    return MathEqualityVerifier()


def check_references(config: VerifierConfig, source: PromptSource) -> None:
    """Check every prompt of a finite source, to find a bad reference answer before the run.

    Raises:
        DataError: a prompt has no usable reference answer.
    """
    verifier = build_verifier(config)
    for index in range(source.num_prompts or 0):
        verifier.check(source.get(index))


class ChainVerifier:
    """Judges a response by the procedural task's own check."""

    def __init__(self, task: ChainTask) -> None:
        self._task = task

    def check(self, prompt: Prompt | RawPrompt) -> None:
        for key in (PROBLEM_KEY, ANSWER_KEY):
            _task_value(prompt, key)

    def correct(self, prompt: Prompt, response_text: str) -> bool:
        problem = Problem(
            problem_id=prompt.prompt_id,
            text=_task_value(prompt, PROBLEM_KEY),
            answer=_task_value(prompt, ANSWER_KEY),
        )
        return self._task.check(problem, response_text)


class MathEqualityVerifier:
    r"""Judges mathematical equality with the reference, by math-verify.

    Reference: the text after the last ``####`` (GSM8K), else the whole text; in it the last
    ``\boxed{}`` or ``$...$`` if there is one, else all of it as LaTeX. Response: the last
    ``\boxed{}`` (several joined by a comma, "and" or "or" count as one set), else the last
    expression after the last ``####``, else the last expression. A response that does not parse, or
    takes more than `TIMEOUT_S` or `MEMORY_BYTES`, is not correct.

    Thread-safe; calls take turns. The first call starts a process (about 1 s).
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._worker = _Worker(timeout_s)
        self._good_references: set[str] = set()

    def correct(self, prompt: Prompt, response_text: str) -> bool:
        self.check(prompt)
        reference = _reference_text(_task_value(prompt, ANSWER_KEY))
        question = {"reference": reference, "response": _final_part(response_text)}
        return self._worker.ask(question) is True

    def check(self, prompt: Prompt | RawPrompt) -> None:
        reference = _reference_text(_task_value(prompt, ANSWER_KEY))
        if reference in self._good_references:
            return
        if self._worker.ask({"reference": reference}) is not True:
            raise DataError(
                f"prompt {prompt.prompt_id} (numbered from 0): the reference answer "
                f"{prompt.task_data[ANSWER_KEY]!r} "
                "is not a mathematical expression, expected a number or LaTeX (a product of "
                "letters as a*b*c); correct the data or change prompts.answer_field"
            )
        self._good_references.add(reference)


def _task_value(prompt: Prompt | RawPrompt, key: str) -> str:
    if key not in prompt.task_data:
        raise DataError(
            f"prompt {prompt.prompt_id} has no {key!r} in its task data, which holds "
            f"{sorted(prompt.task_data)}; set prompts.answer_field, or use a verifier of the "
            "prompts' own kind"
        )
    return prompt.task_data[key]


def _reference_text(answer: str) -> str:
    text = answer.rsplit(FINAL_ANSWER_MARK, 1)[-1].strip()
    if _BOXED in text:
        return _last_boxes(text)
    # math-verify takes LaTeX only where something marks it as LaTeX.
    return text if "$" in text else f"${text}$"


def _final_part(response_text: str) -> str:
    text = response_text[-MAX_RESPONSE_CHARS:]
    return _last_boxes(text) if _BOXED in text else text.rsplit(FINAL_ANSWER_MARK, 1)[-1]


def _last_boxes(text: str) -> str:
    """Return the text from the last box on, or from the first of several that only ``,``, "and" or
    "or" separate.

    math-verify makes one set of all boxes in a text. An answer that is corrected later, or steps in
    boxes of their own, would then never equal the reference.
    """
    start = text.rindex(_BOXED)
    while True:
        previous = text.rfind(_BOXED, 0, start)
        if previous < 0 or not _JOINT.fullmatch(_after_braces(text[previous:start])):
            return text[start:]
        start = previous


def _after_braces(text: str) -> str:
    """Return the text after the first balanced ``{...}``; empty if it is never closed."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if character == "}" and depth == 0:
            return text[index + 1 :]
    return ""


class _Worker:
    """Calls `verifier_process` like a function; returns None if the process died."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, question: dict[str, str]) -> bool | None:
        with self._lock:
            line = _exchange(self._running(), json.dumps(question))
        return json.loads(line) if line else None

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        if self._process is not None:
            self._finalizer()
        self._process = _started(self._timeout_s)
        # Ends the process when this object is deleted or the interpreter exits.
        self._finalizer = weakref.finalize(self, _end, self._process)
        return self._process


def _exchange(process: "subprocess.Popen[str]", line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        process.wait()  # else `poll` could still report it alive, and nothing would restart it
    return answer


def _started(timeout_s: float) -> "subprocess.Popen[str]":
    command = [sys.executable, str(Path(__file__).with_name("verifier_process.py"))]
    process = subprocess.Popen(
        [*command, str(timeout_s), str(MEMORY_BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert process.stdout is not None
    if not process.stdout.readline():
        _end(process)
        raise EngineError(
            f"the process of the math verifier ended with status {process.returncode} while "
            "starting (its error stands above), expected it to load math-verify; install "
            "math-verify or change verifier.kind"
        )
    return process


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # closing flushes to a process that no longer reads
                pipe.close()
