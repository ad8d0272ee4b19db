"""Judges answers to a procedural task."""

from qwen3_distill.data.chain_task import Problem
from qwen3_distill.data.sources import ANSWER_KEY, PROBLEM_KEY, RawPrompt
from qwen3_distill.data.tasks import Task
from qwen3_distill.data.verifiers.base import task_value
from qwen3_distill.types import Prompt


class ProceduralVerifier:
    """Judges a response by the procedural task's own check."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def check(self, prompt: Prompt | RawPrompt) -> None:
        for key in (PROBLEM_KEY, ANSWER_KEY):
            task_value(prompt, key)

    def correct(self, prompt: Prompt, response_text: str) -> bool:
        problem = Problem(
            problem_id=prompt.prompt_id,
            text=task_value(prompt, PROBLEM_KEY),
            answer=task_value(prompt, ANSWER_KEY),
        )
        return self._task.check(problem, response_text)
