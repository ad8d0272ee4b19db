"""The tasks on decimal numbers: right by construction, split by text, checked exactly."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.config import TaskName, TaskPrompts
from qwen3_distill.data.chain_task import Problem, Split
from qwen3_distill.data.digit_tasks import MultiplyTask, SumTask
from qwen3_distill.data.sources import PROBLEM_KEY, build_source
from qwen3_distill.data.tasks import TASKS

NAMES: tuple[TaskName, ...] = ("chain", "long_chain", "multiply", "sum")


def solution(name: TaskName, problem: Problem) -> str:
    return "".join(segment.text for segment in TASKS[name].solution_segments(problem))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(split=st.sampled_from(["train", "eval"]), index=st.integers(0, 10**6))
def test_the_worked_solution_is_accepted_and_any_other_answer_is_not(
    name: TaskName, split: Split, index: int
) -> None:
    problem = TASKS[name].problem(split, index)
    text = solution(name, problem)
    check = TASKS[name].check
    assert check(problem, text)
    assert not check(problem, text + "0")
    assert not check(problem, text[:-1])
    assert not check(problem, "")


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_problem(name: TaskName) -> None:
    texts = {
        split: {TASKS[name].problem(split, index).text for index in range(2000)}
        for split in ("train", "eval")
    }
    assert texts["train"].isdisjoint(texts["eval"])


def test_a_product_is_worked_out_digit_by_digit() -> None:
    problem = Problem(problem_id="p", text="m347*26=", answer="9022")
    text = "".join(segment.text for segment in MultiplyTask().solution_segments(problem))
    assert text == (
        "7*6+0=42;4*6+4=28;3*6+2=20;>2082;7*2+0=14;4*2+1=09;3*2+0=06;>0694;"
        "2+0+0=02;8+4+0=12;0+9+1=10;2+6+1=09;0+0+0=00;>09022;#9022"
    )


@settings(max_examples=50, deadline=None)
@given(index=st.integers(0, 10**6))
def test_every_written_step_of_a_product_is_true(index: int) -> None:
    task = MultiplyTask()
    problem = task.problem("train", index)
    first, second = re.findall(r"\d+", problem.text)
    assert problem.answer == str(int(first) * int(second))
    text = solution("multiply", problem)
    for a, operator, b, carry, value in re.findall(r"(\d)([*+])(\d)\+(\d)=(\d\d);", text):
        result = int(a) * int(b) if operator == "*" else int(a) + int(b)
        assert result + int(carry) == int(value)


def test_a_sum_is_answered_at_once() -> None:
    problem = SumTask().problem("train", 3)
    first, second = re.findall(r"\d+", problem.text)
    assert problem.answer == str(int(first) + int(second))
    assert [segment.text for segment in SumTask().solution_segments(problem)] == [problem.answer]


def test_a_source_begins_at_its_first_problem() -> None:
    later = build_source(TaskPrompts(kind="task", task="sum", split="eval", first=7, limit=3))
    from_start = build_source(TaskPrompts(kind="task", task="sum", split="eval"))
    texts = [later.get(index).task_data[PROBLEM_KEY] for index in range(3)]
    assert texts == [from_start.get(7 + index).task_data[PROBLEM_KEY] for index in range(3)]
