"""The procedural tasks by the names that a config gives them."""

import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from qwen3_distill.config import TaskName
from qwen3_distill.data.chain_task import ChainTask, Problem, Segment, Split
from qwen3_distill.data.digit_tasks import MultiplyTask, SumTask


class Task(Protocol):
    """Makes problems without end, works them out and checks answers."""

    def problem(self, split: Split, index: int) -> Problem:
        """Return problem number ``index`` of a split; splits never share a problem."""
        ...

    def solution_segments(
        self, problem: Problem, rng: random.Random | None = None
    ) -> list[Segment]:
        """Return a right solution; with ``rng``, where the task has it, with repaired errors."""
        ...

    def check(self, problem: Problem, response_text: str) -> bool:
        """Return whether a response gives the problem's answer."""
        ...


TASKS: Mapping[TaskName, Task] = MappingProxyType(
    {
        "chain": ChainTask(),
        "long_chain": ChainTask(modulus=97, min_steps=10, max_steps=16),
        "multiply": MultiplyTask(),
        "sum": SumTask(),
    }
)
