"""Tests of the procedural task behind the lab models."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from qwen3_distill.data.chain_task import ChainTask, Problem, Split
from tests.unit.data.chain_solutions import worked_solution

TASK = ChainTask()
PROBLEM = Problem(problem_id="hand-made", text="17+5*3*6=", answer="16")


def test_known_solution() -> None:
    assert worked_solution(TASK, PROBLEM) == "17+5=3;3*3=9;9*6=16;#16"


@pytest.mark.parametrize("split", ["train", "eval"])
def test_problem_depends_on_seed_split_and_index_only(split: Split) -> None:
    in_order = [TASK.problem(split, index) for index in range(50)]
    backwards = [ChainTask().problem(split, index) for index in reversed(range(50))]
    assert in_order == backwards[::-1]
    assert in_order != [replace(TASK, seed=1).problem(split, index) for index in range(50)]


def test_problem_is_stable_across_processes() -> None:
    code = (
        "from qwen3_distill.data.chain_task import ChainTask; "
        "print(ChainTask().problem('eval', 7).text)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "123", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.strip() == TASK.problem("eval", 7).text


def test_splits_are_disjoint() -> None:
    held_out = {TASK.problem("eval", index).text for index in range(5_000)}
    train = {TASK.problem("train", index).text for index in range(20_000)}
    assert not held_out & train


def test_splits_are_disjoint_where_problems_repeat() -> None:
    tiny = ChainTask(modulus=5, max_operand=3, min_steps=1, max_steps=2)
    held_out = {tiny.problem("eval", index).text for index in range(2_000)}
    for seed in range(3):
        reseeded = replace(tiny, seed=seed)
        assert not held_out & {reseeded.problem("train", index).text for index in range(2_000)}


def test_split_of_agrees_with_problem() -> None:
    for index in range(200):
        assert TASK.split_of(TASK.problem("eval", index).text) == "eval"
        assert TASK.split_of(TASK.problem("train", index).text) == "train"


def test_first_held_out_problems_are_distinct() -> None:
    texts = [TASK.problem("eval", index).text for index in range(3_000)]
    assert len(set(texts)) == len(texts)


def test_problem_identifiers_are_unique() -> None:
    problems = [TASK.problem(s, i) for s in ("train", "eval") for i in range(100)]  # type: ignore[arg-type]
    assert len({problem.problem_id for problem in problems}) == 200


def test_problem_has_the_configured_shape() -> None:
    lengths = set()
    for index in range(500):
        text = TASK.problem("train", index).text
        operands = [int(number) for number in re.findall(r"[0-9]+", text)]
        assert 0 <= operands[0] < TASK.modulus
        assert all(TASK.min_operand <= value <= TASK.max_operand for value in operands[1:])
        lengths.add(len(operands) - 1)
    assert lengths == set(range(TASK.min_steps, TASK.max_steps + 1))


def test_every_worked_solution_is_accepted() -> None:
    rng = random.Random(0)
    for index in range(300):
        problem = TASK.problem("train", index)
        assert TASK.check(problem, worked_solution(TASK, problem))
        assert TASK.check(problem, worked_solution(TASK, problem, rng))


def test_every_equation_of_a_solution_is_true() -> None:
    solution = worked_solution(TASK, TASK.problem("train", 3))
    previous = None
    for left, operator, right, result in re.findall(r"(\d+)([-+*])(\d+)=(\d+);", solution):
        value = {"+": int(left) + int(right), "-": int(left) - int(right)}.get(
            operator, int(left) * int(right)
        )
        assert value % TASK.modulus == int(result)
        assert previous in (None, left)
        previous = result


def test_solution_without_rng_has_no_errors() -> None:
    segments = TASK.solution_segments(PROBLEM)
    assert not any(segment.is_error for segment in segments)


def test_errors_are_wrong_marked_and_redone() -> None:
    task = replace(TASK, error_rate=1.0, max_errors_per_step=1)
    segments = task.solution_segments(PROBLEM, random.Random(0))
    errors = [i for i, segment in enumerate(segments) if segment.is_error]
    assert len(errors) == 3
    for index in errors:
        equation, wrong, mark, redone = segments[index - 1 : index + 3]
        assert mark.text == "!"
        assert redone.text.startswith(equation.text)
        right = redone.text.removeprefix(equation.text).removesuffix(";")
        assert not right.startswith(wrong.text)


def test_errors_in_a_row_are_bounded() -> None:
    task = replace(TASK, error_rate=1.0, max_errors_per_step=2)
    assert worked_solution(task, PROBLEM, random.Random(0)).count("!") == 2 * 3


def test_error_rate_is_respected() -> None:
    rng = random.Random(0)
    task = replace(TASK, error_rate=0.2, max_errors_per_step=1)
    solutions = [worked_solution(task, task.problem("train", i), rng) for i in range(1_000)]
    rate = sum(s.count("!") for s in solutions) / sum(s.count(";") for s in solutions)
    assert rate == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize(
    "response",
    [
        "#16",
        "17+5=3;3*3=9;9*6=16;#16",
        "17+5=3;3*3=5!3*3=9;9*6=16;#16",
    ],
)
def test_check_accepts(response: str) -> None:
    assert TASK.check(PROBLEM, response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "16",
        "#",
        "#17",
        "#1",
        "#116",
        "#016",
        "#-16",
        "#+16",
        "# 16",
        "#16 ",
        "#16\n",
        "#16;",
        "#16#16",
        "#17#16",
        "##16",
        "#16.0",
        "#\u0661\u0666",
        "17+5=3;3*3=9;9*6=16;",
        "17+5=3;3*3=9;9*6=16;#16<|end|>",
        "#16 and more",
    ],
)
def test_check_rejects(response: str) -> None:
    assert not TASK.check(PROBLEM, response)


@pytest.mark.parametrize("text", ["", "5=", "17+5", "17+5=22", "17/5=", "017+5=", "17+=", " 17+5="])
def test_worked_solution_rejects_other_texts(text: str) -> None:
    with pytest.raises(ValueError, match="not a chain expression"):
        worked_solution(TASK, Problem(problem_id="x", text=text, answer="0"))


@pytest.mark.parametrize(
    "parameters",
    [
        {"modulus": 2},
        {"min_operand": 5, "max_operand": 4},
        {"min_operand": -1},
        {"min_steps": 0},
        {"min_steps": 5, "max_steps": 4},
        {"operators": ""},
        {"operators": "+/"},
        {"error_rate": 1.5},
        {"eval_share": 0.0},
        {"eval_share": 1.0},
        {"max_errors_per_step": -1},
    ],
)
def test_bad_parameters_are_rejected(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|empty"):
        ChainTask(**parameters)


def test_problem_rejects_bad_arguments() -> None:
    with pytest.raises(ValueError, match="split"):
        TASK.problem("test", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="index"):
        TASK.problem("train", -1)


def test_task_and_problem_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        TASK.modulus = 7  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        PROBLEM.text = "1+2="  # type: ignore[misc]
