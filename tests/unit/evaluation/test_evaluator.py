"""Which model is evaluated when, on how many problems, and what is told meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from qwen3_distill.config import EvaluationConfig
from qwen3_distill.errors import WeightVersionError
from qwen3_distill.evaluation.evaluator import Evaluator
from qwen3_distill.ports import Sampler
from qwen3_distill.types import (
    FinishReason,
    Prompt,
    Rollout,
    RolloutRequest,
    VersionSpan,
    WeightVersion,
)

VERSION = WeightVersion(step=0, digest="0")


class Answering:
    """Answers every request with one token."""

    def __init__(self, token: int) -> None:
        self._token = token
        self.seeds: list[int] = []
        self.temperatures: list[float] = []

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        for request in requests:
            self.seeds.append(request.sampling.seed)
            self.temperatures.append(request.sampling.temperature)
            yield Rollout(
                rollout_id=request.rollout_id,
                prompt=request.prompt,
                sampling=request.sampling,
                response_ids=np.array([self._token], dtype=np.int32),
                behavior_logprobs=np.array([-1.0], dtype=np.float32),
                versions=(VersionSpan(start=0, stop=1, version=VERSION),),
                finish_reason=FinishReason.STOP,
            )


class Evaluation:
    """An evaluator over a student that is always wrong and a teacher that is always right."""

    def __init__(self, **changes: Any) -> None:
        self.student, self.teacher = Answering(1), Answering(2)
        self.said: list[str] = []
        self.is_open = False
        values: dict[str, Any] = {
            "prompts": {"kind": "task", "split": "eval"},
            "verifier": {"kind": "task"},
            "every_steps": 4,
            "num_problems": 2,
            "sampling": {"max_new_tokens": 8},
        }
        self.evaluator = Evaluator(
            EvaluationConfig.model_validate(values | changes),
            student=self.student,
            teacher_sampler=self._open_teacher,
            problems=lambda count: [
                Prompt(prompt_id=f"p{n}", token_ids=np.array([n], dtype=np.int32), task_data={})
                for n in range(count)
            ],
            is_correct=lambda rollout: rollout.response_ids.tolist() == [2],
            total_steps=10,
            seed=0,
            say=self.said.append,
        )

    @asynccontextmanager
    async def _open_teacher(self) -> AsyncIterator[Sampler]:
        self.is_open = True
        yield self.teacher
        self.is_open = False

    def run(self, model: str, step: int, version: WeightVersion = VERSION) -> dict[str, Any]:
        return asyncio.run(self.evaluator.run(model, step, version))


def test_the_student_is_due_regularly_and_last_the_teacher_once() -> None:
    due = {step: Evaluation().evaluator.due(step) for step in range(11)}
    assert {step: models for step, models in due.items() if models} == {
        0: ["teacher", "student"],
        4: ["student"],
        8: ["student"],
        10: ["student"],
    }


def test_the_student_is_due_after_chosen_steps_and_the_last() -> None:
    evaluator = Evaluation(at_steps=(1, 3, 7)).evaluator
    assert [step for step in range(11) if "student" in evaluator.due(step)] == [1, 3, 7, 10]
    assert evaluator.due(0) == ["teacher"]


def test_the_teacher_may_be_left_out() -> None:
    assert Evaluation(teacher=False).evaluator.due(0) == ["student"]


@pytest.mark.parametrize(("step", "count"), [(0, 5), (4, 2), (10, 5)])
def test_first_and_last_evaluation_may_have_more_problems(step: int, count: int) -> None:
    assert Evaluation(final_num_problems=5).run("student", step)["num_problems"] == count


def test_each_model_is_measured_by_its_own_sampler_with_the_same_seeds() -> None:
    evaluation = Evaluation()
    assert evaluation.run("student", 0)["accuracy"] == 0.0
    assert not evaluation.teacher.seeds
    assert evaluation.run("teacher", 0)["accuracy"] == 1.0
    assert not evaluation.is_open
    assert evaluation.teacher.seeds == evaluation.student.seeds
    assert len(set(evaluation.student.seeds)) == 2


def test_progress_names_the_models_that_are_being_evaluated() -> None:
    evaluation = Evaluation()
    evaluation.run("student", 0)
    evaluation.run("teacher", 0)
    assert evaluation.said == [
        "evaluating the student 1/2",
        "evaluating the student 2/2",
        "evaluating the teacher 1/2",
        "evaluating the teacher 2/2",
    ]


# --- A second temperature -----------------------------------------------------------------------


def test_a_second_temperature_is_a_measurement_of_its_own() -> None:
    plain, second = Evaluation(), Evaluation(second_temperature=0.0, samples_per_problem=3)
    assert plain.evaluator.measurements("student") == ["student"]
    assert second.evaluator.measurements("student") == ["student", "student@0"]
    first = second.run("student", 0)
    assert "temperature" not in first
    assert first["samples_per_problem"] == 3
    greedy = second.run("student@0", 0)
    assert greedy["temperature"] == 0.0
    assert greedy["samples_per_problem"] == 1
    assert second.student.temperatures == [1.0] * 6 + [0.0] * 2


def test_the_first_measurement_is_the_same_with_a_second() -> None:
    plain, second = Evaluation(), Evaluation(second_temperature=0.3)
    assert plain.run("student", 0) == second.run("student", 0)
    assert plain.student.seeds == second.student.seeds


def test_the_teacher_is_measured_by_its_own_sampler_at_the_second_temperature() -> None:
    evaluation = Evaluation(second_temperature=0.3)
    assert evaluation.run("teacher@0.3", 0)["accuracy"] == 1.0
    assert evaluation.teacher.temperatures == [0.3, 0.3]
    assert evaluation.said[-1] == "evaluating the teacher at temperature 0.3 2/2"


@pytest.mark.parametrize(
    "changes",
    [
        {"second_temperature": 1.0},
        {"second_temperature": 0.0, "sampling": {"temperature": 0.0}},
        {"second_temperature": -0.5},
        {"second_temperature": 0.0005},
        {"sampling": {"temperature": 0.0005}},
    ],
)
def test_a_temperature_that_measures_nothing_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Evaluation(**changes)


def test_a_student_that_answers_with_other_weights_is_not_measured() -> None:
    for other in (WeightVersion(step=1, digest="0"), WeightVersion(step=0, digest="1")):
        with pytest.raises(WeightVersionError, match="sampled with the weights of step 0"):
            Evaluation().run("student", 0, other)
        Evaluation().run("teacher", 0, other)
