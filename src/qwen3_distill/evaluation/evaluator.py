"""Schedules the evaluations of a run and carries them out."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from qwen3_distill.config import EvaluationConfig
from qwen3_distill.errors import WeightVersionError
from qwen3_distill.evaluation.accuracy import evaluate
from qwen3_distill.ports import Sampler
from qwen3_distill.types import Prompt, Rollout, RolloutRequest, WeightVersion
from qwen3_distill.utils.seeds import derive_seed


def measured_at(model: str, temperature: float) -> str:
    """Return the name of a model's evaluation at the second temperature, e.g. ``student@0``."""
    return f"{model}@{temperature:g}"


class _SamplesWith:
    """A sampler whose rollouts are all of one weight version.

    Raises:
        WeightVersionError: a rollout is of another one.
    """

    def __init__(self, sampler: Sampler, version: WeightVersion) -> None:
        self._sampler, self._version = sampler, version

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        async for rollout in self._sampler.generate(requests):
            for span in rollout.versions:
                if span.version != self._version:
                    raise WeightVersionError(
                        f"an answer of the evaluation was sampled with the weights of step "
                        f"{span.version.step} (digest {span.version.digest}), but those of step "
                        f"{self._version.step} (digest {self._version.digest}) are evaluated"
                    )
            yield rollout


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

    def measurements(self, model: str) -> list[str]:
        """Names of a model's evaluations: ``student``, and ``student@0`` at the second
        temperature 0."""
        second = self._evaluation.second_temperature
        return [model] if second is None else [model, measured_at(model, second)]

    def due(self, step: int) -> list[str]:
        """The models to evaluate after this step: ``teacher``, ``student``, both or none."""
        models = ["teacher"] if step == 0 and self._evaluation.teacher else []
        due = self._evaluation.is_due(step, self._total_steps)
        return [*models, "student"] if due else models

    async def run(self, name: str, step: int, version: WeightVersion) -> dict[str, Any]:
        """Make one of the `measurements`; return its `EvaluationResult.record`.

        At the second temperature there is the field ``temperature`` as well.

        Args:
            version: the student's weights after this step.

        Raises:
            WeightVersionError: the student answered with other weights.
        """
        evaluation = self._evaluation
        model, _, second = name.partition("@")
        temperature = float(second) if second else evaluation.sampling.temperature
        settings = evaluation.at_temperature(temperature)
        count = evaluation.num_problems
        if step in (0, self._total_steps) and evaluation.final_num_problems is not None:
            count = evaluation.final_num_problems
        if model == "student":
            student = _SamplesWith(self._student, version)
            result = await self._measure(name, count, settings, student)
        else:
            async with self._teacher_sampler() as teacher:
                result = await self._measure(name, count, settings, teacher)
        return result | ({"temperature": temperature} if second else {})

    async def _measure(
        self, name: str, count: int, settings: EvaluationConfig, sampler: Sampler
    ) -> dict[str, Any]:
        who = "the " + name.replace("@", " at temperature ")

        def count_answer(done: int, total: int) -> None:
            self._progress[name] = f"{who} {done}/{total}"
            self._say(f"evaluating {', '.join(self._progress.values())}")

        try:
            result = await evaluate(
                sampler,
                self._problems(count),
                self._is_correct,
                sampling=settings.sampling,
                samples_per_problem=settings.samples_per_problem,
                seed=derive_seed(self._seed, "evaluation"),
                on_rollout=count_answer,
            )
        finally:
            self._progress.pop(name, None)
        return result.record()
