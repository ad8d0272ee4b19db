"""Schedules the evaluations of a run and carries them out."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from typing import Any

from qwen3_distill.config import EvaluationConfig
from qwen3_distill.evaluation.accuracy import evaluate
from qwen3_distill.ports import Sampler
from qwen3_distill.types import Prompt, Rollout
from qwen3_distill.utils.seeds import derive_seed


class Evaluator:
    """Measures the student's accuracy regularly, and the teacher's once before the first step.

    Args:
        student: samples from the student.
        teacher_sampler: opens a sampler that answers as the teacher.
        problems: returns the first n held-out problems, always the same ones.
        is_correct: checks an answer; gives a bool, or a reward in [0, 1].
        total_steps: the run's number of steps; after the last one the student is measured too.
        seed: the run's seed.
        say: told how many answers there are, after each one.
    """

    def __init__(
        self,
        evaluation: EvaluationConfig,
        *,
        student: Sampler,
        teacher_sampler: Callable[[], AbstractAsyncContextManager[Sampler]],
        problems: Callable[[int], Sequence[Prompt]],
        is_correct: Callable[[Rollout], float],
        total_steps: int,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self._evaluation = evaluation
        self._student, self._teacher_sampler = student, teacher_sampler
        self._problems, self._is_correct = problems, is_correct
        self._total_steps, self._seed, self._say = total_steps, seed, say
        self._progress: dict[str, str] = {}
        """Answers so far of each model that is being evaluated."""

    def due(self, step: int) -> list[str]:
        """The models to evaluate after this step: ``teacher``, ``student``, both or none."""
        models = ["teacher"] if step == 0 and self._evaluation.teacher else []
        regular = step % self._evaluation.every_steps == 0 or step == self._total_steps
        return [*models, "student"] if regular else models

    async def run(self, model: str, step: int) -> dict[str, Any]:
        """Evaluate one model; return the fields of its `EvaluationResult`."""
        evaluation = self._evaluation
        count = evaluation.num_problems
        if step in (0, self._total_steps) and evaluation.final_num_problems is not None:
            count = evaluation.final_num_problems
        if model == "student":
            return await self._measure(model, count, self._student)
        async with self._teacher_sampler() as teacher:
            return await self._measure(model, count, teacher)

    async def _measure(self, model: str, count: int, sampler: Sampler) -> dict[str, Any]:
        def count_answer(done: int, total: int) -> None:
            self._progress[model] = f"the {model} {done}/{total}"
            self._say(f"evaluating {', '.join(self._progress.values())}")

        try:
            result = await evaluate(
                sampler,
                self._problems(count),
                self._is_correct,
                sampling=self._evaluation.sampling,
                samples_per_problem=self._evaluation.samples_per_problem,
                seed=derive_seed(self._seed, "evaluation"),
                on_rollout=count_answer,
            )
        finally:
            self._progress.pop(model, None)
        return asdict(result)
