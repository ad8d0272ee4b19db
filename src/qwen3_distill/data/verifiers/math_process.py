"""Process that compares mathematical answers with math-verify, one JSON line per question.

One comparison can take forever or all memory: ``9^{9^{9}}`` is 9 characters long, and sympy
evaluates it exactly. math-verify's own timeout is a signal handler, which works in the main thread
only. Here a watchdog thread ends the process, even if the process that asked is dead.

Imports the standard library and math-verify only, and is started by its path, so that numpy's and
torch's threads do not start. Usage: ``verifier_process.py TIMEOUT_S MEMORY_BYTES``.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import signal
import sys
from typing import TextIO

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

# A boxed expression comes before every other candidate; the others are taken from the end.
_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
"""A word of three letters or more that is not a LaTeX command."""
_CONSTANTS = {"e", "i"}
"""Letters that sympy reads as constants, not as symbols."""


def parsed(text: str) -> list:
    """Parse the last expression in ``text``; empty if there is none that can be parsed."""
    # first_match: only the last candidate counts. The default would go on to earlier numbers when
    # the final answer is garbage, and an intermediate result could pass for the answer.
    return parse(
        text,
        extraction_config=_EXTRACTION,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]
    )


def is_usable(reference: str) -> bool:
    """Return whether a reference parses, and not as the product of the letters of a word in it.

    No answer in plain words would ever equal such a product.
    """
    found = parsed(reference)
    names = {symbol.name.lower() for part in found for symbol in part.free_symbols}
    letters = _CONSTANTS.union(*names)
    words = {word.lower() for word in _WORD.findall(reference)} - names  # \text{...} is a name
    return bool(found) and not any(letters.issuperset(word) for word in words)


def answer(question: dict[str, str]) -> bool:
    """Return whether the reference is usable; with a response, whether the response equals it."""
    if "response" not in question:
        return is_usable(question["reference"])
    reference = parsed(question["reference"])
    response = parsed(question["response"])
    return verify(reference, response, timeout_seconds=None) is True


def main(timeout_s: float, memory_bytes: int) -> None:
    """Write ``true`` once ready, then answer line by line until the input ends.

    A question that takes longer than ``timeout_s`` ends the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    logging.disable(logging.WARNING)  # math-verify warns that its own timeout is off
    _limit_memory(memory_bytes)
    # Builds parsers and patterns before any question's time limit runs, and finds a broken LaTeX
    # parser, which would otherwise look like answers that do not parse.
    if not answer({"reference": r"$\frac{1}{2}$", "response": "0.5"}):
        sys.exit("math-verify cannot tell that 1/2 is 0.5; is its antlr4 runtime a supported one?")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):  # only answers may go to the caller
        os.dup2(nowhere, stream.fileno())
    _say(True, answers)
    for line in sys.stdin:
        faulthandler.dump_traceback_later(timeout_s, exit=True)
        result = answer(json.loads(line))
        faulthandler.cancel_dump_traceback_later()
        _say(result, answers)


def _say(result: bool, answers: TextIO) -> None:
    answers.write(json.dumps(result) + "\n")
    answers.flush()


def _limit_memory(memory_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows; the time limit still holds
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
