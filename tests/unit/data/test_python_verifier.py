"""A user's function: its rewards, and everything that may go wrong with it."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from pydantic import ValidationError

from qwen3_distill.config import JsonlPrompts, PythonVerifier, TaskPrompts
from qwen3_distill.data.sources import build_source
from qwen3_distill.data.verifiers import build_verifier, check_references, line_process
from qwen3_distill.data.verifiers.python_function import PythonFunctionVerifier
from qwen3_distill.errors import DataError, EngineError
from qwen3_distill.types import Prompt


class Written(Protocol):
    def __call__(
        self, body: str, head: str = "", timeout_s: float = ...
    ) -> PythonFunctionVerifier: ...


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Makes a verifier whose function ``f(row, response)`` has the given body."""

    def write(body: str, head: str = "", timeout_s: float = 60.0) -> PythonFunctionVerifier:
        file = tmp_path / "rewards.py"
        lines = "\n    ".join(body.splitlines())
        file.write_text(f"import os, sys, time, math\n{head}\ndef f(row, response):\n    {lines}\n")
        config = PythonVerifier(kind="python", function=f"{file}:f", timeout_s=timeout_s)
        return PythonFunctionVerifier(config)

    return write


def prompt(**task_data: str) -> Prompt:
    return Prompt(prompt_id="p:3", token_ids=np.array([1], dtype=np.int32), task_data=task_data)


@pytest.mark.parametrize(
    ("body", "reward"),
    [
        ("return response == row['answer']", True),
        ("return response != row['answer']", False),
        ("return 0.25", 0.25),
        ("return 1", 1),
        ("return len(response) / 4", 0.5),
        ("return row['prompt_id'] == 'p:3' and sorted(row) == ['answer', 'prompt_id']", True),
        ("print('noise'); sys.stdout.write('more'); return 0.5", 0.5),
        ("return sys.stdin.read() == ''", True),
        ("import numpy; return numpy.float32(0.5)", 0.5),
        ("import numpy; return numpy.bool_(True)", True),
        ("return 'torch' not in sys.modules and 'qwen3_distill' not in sys.modules", True),
    ],
)
def test_a_verdict_or_a_reward_is_returned(written: Written, body: str, reward: float) -> None:
    given = written(body).correct(prompt(answer="42"), "42")
    assert given == reward
    assert type(given) is type(reward)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", r"raised ZeroDivisionError: division by zero \(rewards.py, line 4\)"),
        ("return row['missing']", "raised KeyError"),
        ("sys.exit(0)", "raised SystemExit"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("return f(row, response)", "raised RecursionError"),
        ("return None", "returned None of type NoneType"),
        ("return 'yes'", "returned 'yes' of type str"),
        ("return math.nan", "returned nan of type float"),
        ("return math.inf", "returned inf"),
        ("return -0.01", "returned -0.01"),
        ("return 1.01", "returned 1.01"),
        ("return 2", "returned 2 of type int"),
        ("return [1]", "returned .1. of type list"),
        ("return 1j", "of type complex"),
        ("time.sleep(60)", "took longer than timeout_s=2 s"),
        ("while True: pass", "took longer than timeout_s=2 s"),
        ("os._exit(0)", "ended its process"),
        ("os.kill(os.getpid(), 9)", "ended its process"),
    ],
)
def test_anything_else_is_an_error_with_the_row_and_the_next_answer_is_judged(
    written: Written, body: str, message: str
) -> None:
    hangs = "took longer" in message
    verifier = written(
        f"if response != 'bad': return True\n{body}", timeout_s=2.0 if hangs else 60.0
    )
    assert verifier.correct(prompt(), "good") is True
    pattern = message.replace("line 4", "line 5")
    with pytest.raises(DataError, match=rf"p:3 .*{pattern}.*expected True, False or a number"):
        verifier.correct(prompt(), "bad")
    assert verifier.correct(prompt(), "good too") is True


def test_the_process_is_used_again_and_replaced_after_a_hang(written: Written) -> None:
    head = "calls = []"
    verifier = written(
        "calls.append(response)\nif response == 'hang': time.sleep(60)\nreturn len(calls) / 10",
        head,
        timeout_s=2.0,
    )
    assert [verifier.correct(prompt(), text) for text in "abc"] == [0.1, 0.2, 0.3]
    assert verifier.correct(prompt(), "a") == 0.1, "one response of one row is judged once"
    start = time.monotonic()
    with pytest.raises(DataError, match="took longer"):
        verifier.correct(prompt(), "hang")
    assert 1.9 < time.monotonic() - start < 30
    assert verifier.correct(prompt(), "d") == 0.1, "a new process"


LOADED: list[tuple[str, str, str]] = [
    ("", "f", r"has no function 'f'; its functions are \[\]"),
    ("def g(row, response): return 1", "f", r"has no function 'f'; its functions are \['g'\]"),
    ("f = 3", "f", "has no function 'f'"),
    ("def f(row): return 1", "f", r"cannot be called with a row and a response"),
    ("def f(a, b, c): return 1", "f", r"cannot be called with a row and a response"),
    ("async def f(a, b): return 1", "f", "is asynchronous"),
    ("def f(row, response) return 1", "f", "SyntaxError"),
    ("import not_there_at_all", "f", "ModuleNotFoundError"),
    ("1 / 0", "f", "ZeroDivisionError: division by zero"),
    ("import sys; sys.exit(3)", "f", "SystemExit: 3"),
]


@pytest.mark.parametrize(("code", "name", "message"), LOADED)
def test_the_function_is_checked_before_a_run(
    tmp_path: Path, code: str, name: str, message: str
) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(code)
    config = PythonVerifier(kind="python", function=f"{file}:{name}")
    for prompts in (TaskPrompts(kind="task"), rows(tmp_path)):
        with pytest.raises(DataError, match=rf"verifier.function=.*rewards.py:f .*{message}"):
            check_references(config, build_source(prompts))


def rows(folder: Path) -> JsonlPrompts:
    path = folder / "prompts.jsonl"
    path.write_text('{"prompt": "How many?"}\n')
    return JsonlPrompts(kind="jsonl", path=str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    config = PythonVerifier(kind="python", function=f"{tmp_path}/none.py:f")
    with pytest.raises(DataError, match=r"none\.py:f: the file does not exist"):
        check_references(config, build_source(TaskPrompts(kind="task")))


def test_a_file_that_ends_its_process_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("import os; os._exit(7)")
    with pytest.raises(EngineError, match="status 7"):
        build_verifier(PythonVerifier(kind="python", function=f"{file}:f")).check(prompt())


@pytest.mark.parametrize(
    "function", ["", "f", "a.py", "a.py:", "a.py:1f", "a:f", "a.py:b.c", "a.py f"]
)
def test_a_function_is_a_file_and_a_name(function: str) -> None:
    with pytest.raises(ValidationError, match=r"expected path/to/file.py:name"):
        PythonVerifier(kind="python", function=function)


def test_a_file_may_import_its_neighbours_and_call_processes(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("import subprocess, sys\nHALF = 0.5\n")
    file = tmp_path / "rewards.py"
    file.write_text("import neighbour\ndef f(row, response): return neighbour.HALF\n")
    verifier = build_verifier(PythonVerifier(kind="python", function=f"{file}:f"))
    assert verifier.correct(prompt(), "x") == 0.5


def test_the_script_needs_the_standard_library_only() -> None:
    script = Path(line_process.__file__).with_name("function_process.py")
    code = (
        "import json, runpy, sys; runpy.run_path(sys.argv[1]); "
        "print(json.dumps([n for n in ('numpy', 'torch', 'qwen3_distill') if n in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(script)], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == []
