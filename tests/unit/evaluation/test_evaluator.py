"""Which model is evaluated when, on how many problems, and what is told meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from qwen3_distill.config import EvaluationConfig
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

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        for request in requests:
            self.seeds.append(request.sampling.seed)
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

    def run(self, model: str, step: int) -> dict[str, Any]:
        return asyncio.run(self.evaluator.run(model, step))


def test_the_student_is_due_regularly_and_last_the_teacher_once() -> None:
    due = {step: Evaluation().evaluator.due(step) for step in range(11)}
    assert {step: models for step, models in due.items() if models} == {
        0: ["teacher", "student"],
        4: ["student"],
        8: ["student"],
        10: ["student"],
    }


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
