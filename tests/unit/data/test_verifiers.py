import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qwen3_distill.config import (
    ChoiceVerifier,
    ExactVerifier,
    JsonlPrompts,
    MathVerifier,
    PythonVerifier,
    RegexVerifier,
    RunConfig,
    TaskPrompts,
    TaskVerifier,
    VerifierConfig,
)
from qwen3_distill.data.chain_task import ChainTask
from qwen3_distill.data.sources import RawPrompt, build_source
from qwen3_distill.data.verifiers import (
    MathEqualityVerifier,
    Verifier,
    build_verifier,
    line_process,
    math_equality,
)
from qwen3_distill.errors import DataError, EngineError
from qwen3_distill.types import Prompt
from tests.unit.config.test_rules import GOOD
from tests.unit.data.chain_solutions import worked_solution

TOKENS = np.array([1], dtype=np.int32)


def prompt_of(raw: RawPrompt) -> Prompt:
    return Prompt(prompt_id=raw.prompt_id, token_ids=TOKENS, task_data=raw.task_data)


def prompt(answer: str) -> Prompt:
    return Prompt(prompt_id="p:0", token_ids=TOKENS, task_data={"answer": answer})


CONFIGS = [
    (TaskVerifier(kind="task"), "ProceduralVerifier", None),
    (MathVerifier(kind="math"), "MathEqualityVerifier", "a math"),
    (ExactVerifier(kind="exact"), "ExactTextVerifier", "an exact"),
    (ChoiceVerifier(kind="choice"), "ChoiceLetterVerifier", "a choice"),
    (RegexVerifier(kind="regex", pattern="(.)"), "RegexGroupVerifier", "a regex"),
    (PythonVerifier(kind="python", function="f.py:f"), "PythonFunctionVerifier", None),
]
"""Every verifier, what is built for it, and its name where it needs reference answers."""


@pytest.mark.parametrize(("config", "built", "name"), CONFIGS)
def test_every_verifier_of_the_config_is_built_and_fits_its_prompts(
    config: VerifierConfig, built: str, name: str | None
) -> None:
    assert {type(c) for c, _, _ in CONFIGS} == set(get_args(get_args(VerifierConfig)[0]))
    assert type(build_verifier(config)).__name__ == built
    values = GOOD | {"verifier": config.model_dump()}
    if name is None:
        RunConfig.model_validate(values)
    else:
        expected = f"verifier: {name} verifier needs prompts with an answer_field"
        with pytest.raises(ValidationError, match=expected):
            RunConfig.model_validate(values)


@pytest.fixture(scope="module")
def math_verifier() -> Verifier:
    return build_verifier(MathVerifier(kind="math"))


@pytest.fixture(scope="module")
def hasty() -> MathEqualityVerifier:
    return MathEqualityVerifier(timeout_s=2.5)


# --- Procedural task ----------------------------------------------------------------------------


def test_task_verifier_uses_the_tasks_check() -> None:
    verifier = build_verifier(TaskVerifier(kind="task"))
    source, task = build_source(TaskPrompts(kind="task")), ChainTask()
    for index in range(20):
        given_prompt = prompt_of(source.get(index))
        solution = worked_solution(task, task.problem("train", index))
        assert verifier.correct(given_prompt, solution) is True
        assert verifier.correct(given_prompt, solution + "0") is False
        assert verifier.correct(given_prompt, "") is False


def test_task_verifier_needs_the_tasks_prompts() -> None:
    verifier = build_verifier(TaskVerifier(kind="task"))
    with pytest.raises(DataError, match=r"p:0 has no 'problem' .* holds \['answer'\]"):
        verifier.correct(prompt("4"), "#4")


# --- Mathematical equality ----------------------------------------------------------------------


def test_gsm8k_solutions_are_correct_and_changed_ones_are_not(
    gsm8k_sample: Path, math_verifier: Verifier
) -> None:
    config = JsonlPrompts(
        kind="jsonl", path=str(gsm8k_sample), prompt_field="question", answer_field="answer"
    )
    source = build_source(config)
    for index in range(40):
        raw = source.get(index)
        solution = raw.task_data["answer"]
        reasoning, number = re.fullmatch(r"(.*#### )([0-9,]+)", solution, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
        value = int(number.replace(",", ""))
        assert math_verifier.correct(prompt_of(raw), solution) is True
        assert math_verifier.correct(prompt_of(raw), rf"so it is \boxed{{{value}}}.") is True
        assert math_verifier.correct(prompt_of(raw), f"{reasoning}{value + 1}") is False
        assert math_verifier.correct(prompt_of(raw), rf"so it is \boxed{{{value}1}}.") is False


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("42", "The answer is 42."),
        ("42", "It costs $40 + $2 = $42"),
        ("42", r"\[ 42.0 \]"),
        ("1,050", r"\boxed{1050}"),
        ("#### 1,050", "#### 1,050"),
        ("1/2", r"\boxed{0.5}"),
        (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}"),
        ("x^2 + 1", r"\boxed{1 + x^2}"),
        (r"Thus $x^2$, so \boxed{2x}", r"$\boxed{x + x}$"),
        (r"$\{1, 2\}$", r"\boxed{2} and \boxed{1}"),
        ("42", r"\boxed{41}. No, wait: \boxed{42}"),
        ("42", "\\boxed{42}\n\n\\boxed{42}"),
        ("42", r"1. \boxed{6}, 2. \boxed{7}, so \boxed{42}"),
        ("42", "7 " * 20000 + r"\boxed{42}"),
    ],
)
def test_equal(math_verifier: Verifier, answer: str, response: str) -> None:
    assert math_verifier.correct(prompt(answer), response) is True


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("42", r"\boxed{42}. No, wait: \boxed{41}"),
        ("42", r"\boxed{42} or \boxed{43}"),
        ("42", r"6 * 7 = 42, so \boxed{\frac}"),
        ("42", r"42 \boxed{}"),
        ("42", r"\boxed{\frac} after 6 * 7 = 42"),
        ("42", "#### 42\n#### 43"),
        ("42", r"\boxed{42} " + "7 " * 20000),
        ("42", "forty-two"),
        ("42", ""),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}"),
    ],
)
def test_not_equal(math_verifier: Verifier, answer: str, response: str) -> None:
    assert math_verifier.correct(prompt(answer), response) is False


def ones(count: int) -> str:
    return r"\boxed{" + "+".join("1" * count) + "}"


def test_an_expression_of_thousands_of_characters_is_no_answer(
    math_verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert math_verifier.correct(prompt("200"), ones(200)) is True
    garbage = "5883" + "".join(f"t{number}" for number in range(75495, 75995))
    began = time.process_time()
    assert math_verifier.correct(prompt("42"), garbage) is False
    assert math_verifier.correct(prompt("600"), ones(600)) is False
    assert time.process_time() - began < 5
    monkeypatch.setattr(math_equality, "LONGEST", 10)
    assert math_verifier.correct(prompt("8"), ones(8)) is False
    roots = r"\sqrt{2}+\sqrt{3}+\sqrt{5}"
    assert math_verifier.correct(prompt(roots), rf"\boxed{{{roots}}}") is True


@given(
    response=st.text(max_size=200) | st.text("0123456789\\{}()$^_+-*/=,#! boxedfrac", max_size=80)
)
@settings(max_examples=60, deadline=None)
def test_garbage_is_never_an_error(hasty: MathEqualityVerifier, response: str) -> None:
    assert hasty.correct(prompt("31415926"), response) is ("31415926" in response)


@pytest.mark.parametrize("response", [r"\boxed{9^{9^{9}}}", r"\boxed{2^{99999999999}}"])
def test_endless_computation_is_not_correct_and_the_next_answer_is_judged(
    hasty: MathEqualityVerifier, response: str
) -> None:
    assert hasty.correct(prompt("42"), "42") is True
    start = time.monotonic()
    assert hasty.correct(prompt("42"), response) is False
    assert 2.4 < time.monotonic() - start < 30
    assert hasty.correct(prompt("42"), "42") is True


def test_works_in_other_threads(math_verifier: Verifier) -> None:
    verdicts: dict[int, float] = {}

    def judge(value: int) -> None:
        verdicts[value] = math_verifier.correct(prompt("3"), f"#### {value}")

    threads = [threading.Thread(target=judge, args=(value,)) for value in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {value: value == 3 for value in range(6)}


IN_WORDS = ["Paris", "yes", "dollars", "Monday", "#### blue"]
"""math-verify takes them for products of letters, which nothing that is answered would equal."""


@pytest.mark.parametrize("answer", ["", "####", r"\frac{", "#### 42 ####", *IN_WORDS])
def test_unusable_reference_is_a_data_error(math_verifier: Verifier, answer: str) -> None:
    with pytest.raises(DataError, match=r"p:0 .* the reference answer .* change prompts\.answer"):
        math_verifier.correct(prompt(answer), "42")


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("5 apples", r"\boxed{5}"),
        ("10 dollars", r"\boxed{10}"),
        ("a*b*c", r"\boxed{cab}"),
        (r"\frac{xy}{2}", r"$\frac{1}{2}xy$"),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"),
        (r"2\pi", r"\boxed{2\pi}"),
    ],
)
def test_a_reference_may_have_units_letters_and_text_that_is_marked(
    math_verifier: Verifier, answer: str, response: str
) -> None:
    assert math_verifier.correct(prompt(answer), response) is True
    assert math_verifier.correct(prompt(answer), r"\boxed{7}") is False


def test_missing_reference_is_a_data_error(math_verifier: Verifier) -> None:
    without = Prompt(prompt_id="p:0", token_ids=TOKENS)
    with pytest.raises(DataError, match=r"p:0 has no 'answer' in its task data"):
        math_verifier.correct(without, "42")


def test_worker_that_cannot_start_is_an_engine_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_library = tmp_path / "python"
    without_library.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    without_library.chmod(0o755)
    monkeypatch.setattr(line_process.sys, "executable", str(without_library))
    with pytest.raises(EngineError, match=r"ended with status .* install math-verify"):
        build_verifier(MathVerifier(kind="math")).correct(prompt("x"), "$x$")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list["subprocess.Popen[str]"]:
    """The processes that verifiers start during the test."""
    processes: list[subprocess.Popen[str]] = []
    real_start = line_process._started

    def start(command: Sequence[str], text: str) -> "tuple[subprocess.Popen[str], object]":
        process, greeting = real_start(command, text)
        processes.append(process)
        return process, greeting

    monkeypatch.setattr(line_process, "_started", start)
    return processes


def test_process_ends_with_the_verifier(started: list["subprocess.Popen[str]"]) -> None:
    verifier = MathEqualityVerifier()
    assert verifier.correct(prompt("x"), "$x$")
    started[0].kill()
    started[0].wait()
    assert verifier.correct(prompt("x"), "$x$"), "a process killed from outside is replaced"
    assert started[0].stdin is not None
    assert started[0].stdin.closed, "every replaced process would cost two file descriptors"
    del verifier
    gc.collect()
    assert [process.poll() is not None for process in started] == [True, True]


def test_time_between_questions_does_not_count(started: list["subprocess.Popen[str]"]) -> None:
    verifier = MathEqualityVerifier(timeout_s=2)
    assert verifier.correct(prompt("x"), "$x$")
    time.sleep(2.2)
    assert verifier.correct(prompt("x"), "$x$")
    assert len(started) == 1


def test_endless_question_ends_also_when_the_process_that_asked_was_killed() -> None:
    code = """if True:
        import os, threading, time
        from qwen3_distill.data.verifiers.line_process import LineProcess
        worker = LineProcess("math_process.py", ["1.0", "4000000000"], "status {status}")
        assert worker.ask({"reference": "$1$"}) is True
        question = {"reference": "$1$", "response": r"\\boxed{9^{9^{9}}}"}
        threading.Thread(target=worker.ask, args=(question,), daemon=True).start()
        time.sleep(0.2)  # the question is on its way
        print(worker._process.pid, flush=True)
        os.kill(os.getpid(), 9)
    """
    asking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with asking:
        assert asking.stdout is not None
        worker = int(asking.stdout.readline())
    assert asking.returncode == -9
    deadline = time.monotonic() + 20
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    survived = _is_running(worker)
    if survived:
        os.kill(worker, signal.SIGKILL)
    assert not survived


def _is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second while it is read
        return False


def test_worker_script_needs_neither_numpy_nor_this_package() -> None:
    script = Path(line_process.__file__).with_name("math_process.py")
    code = (
        "import json, runpy, sys; runpy.run_path(sys.argv[1]); "
        "print(json.dumps([n for n in ('numpy', 'torch', 'qwen3_distill') if n in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(script)], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == []
