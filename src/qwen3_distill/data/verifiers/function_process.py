"""Process that judges with a user's function or pattern, one JSON line per question.

A function or a pattern can take forever. A watchdog thread ends the process, even if the process
that asked is dead.

Imports the standard library only, and is started by its path, so that torch's threads do not
start.
Usage: ``function_process.py python TIMEOUT_S FILE NAME`` or ``... regex TIMEOUT_S``.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import inspect
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOAD_TIMEOUT_S = 120.0
"""Loading a file may import large libraries."""


def regex_answer(question: dict[str, Any]) -> dict[str, Any]:
    """Return what the pattern's group finds last; None if nothing."""
    flags = re.IGNORECASE if question["ignore_case"] else 0
    last = None
    for match in re.finditer(question["pattern"], question["text"], flags):
        last = match[1] if match[1] is not None else last
    return {"value": last}


def loaded(file: str, name: str) -> Callable[..., Any]:
    """Load a function from a file.

    Raises:
        LookupError: the file has no such function, or it does not take a row and a text.
    """
    sys.path[0] = str(Path(file).resolve().parent)  # as when the file itself is run
    spec = importlib.util.spec_from_file_location("user_verifier", file)
    if spec is None or spec.loader is None:
        raise LookupError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_verifier"] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        names = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
        raise LookupError(f"it has no function {name!r}; its functions are {names}")
    try:
        inspect.signature(function).bind({}, "")
    except TypeError as error:
        raise LookupError(
            f"{name} cannot be called with a row and a response ({error}), expected "
            f"def {name}(row, response)"
        ) from None
    except ValueError:  # written in C, without a signature
        pass
    if inspect.iscoroutinefunction(function):
        raise LookupError(f"{name} is asynchronous, expected a plain function")
    return function


def python_answer(function: Callable[..., Any], question: dict[str, Any]) -> dict[str, Any]:
    """Call the function; return its value if it is a reward, else what is wrong with it."""
    try:
        value = function(question["row"], question["response"])
    except BaseException as error:  # noqa: BLE001 - SystemExit too is an error of the function's
        return {"error": f"raised {_described(error)}"}
    try:
        value = value.item() if hasattr(value, "item") else value  # numpy's and torch's scalars
        good = isinstance(value, bool) or (isinstance(value, int | float) and 0 <= value <= 1)
    except Exception as error:  # noqa: BLE001 - of the value's class
        return {"error": f"returned a value that raised {_described(error)}"}
    if not good:
        return {"error": f"returned {_shortened(value)} of type {type(value).__name__}"}
    return {"value": value}


def _described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {_shortened(error, str)}{where}"


def _shortened(value: object, written: Callable[[object], str] = repr) -> str:
    try:
        text = " ".join(written(value).split())
    except Exception:  # noqa: BLE001 - of the value's class
        return "something that cannot be printed"
    return text if len(text) <= 200 else f"{text[:200]}..."


def main(kind: str, timeout_s: float, *arguments: str) -> None:
    """Write ``true`` once ready, or what is wrong; then answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # only answers may go to the caller
    questions = os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8")
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - the watchdog's, as long as the process
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())  # a function may not read those

    def say(answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    respond = regex_answer
    if kind == "python":
        faulthandler.dump_traceback_later(LOAD_TIMEOUT_S, exit=True, file=nowhere)
        try:
            function = loaded(*arguments)
        except BaseException as error:  # noqa: BLE001 - whatever a user's file raises while it is loaded
            say({"error": str(error) if isinstance(error, LookupError) else _described(error)})
            return
        finally:
            faulthandler.cancel_dump_traceback_later()

        def respond(question: dict[str, Any]) -> dict[str, Any]:
            return python_answer(function, question)

    say(True)
    for line in questions:
        question = json.loads(line)
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=nowhere)
        result = respond(question)
        faulthandler.cancel_dump_traceback_later()
        say(result)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *sys.argv[3:])
