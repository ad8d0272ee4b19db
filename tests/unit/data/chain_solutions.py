"""Solutions of the chain task as texts."""

import random

from qwen3_distill.data.chain_task import ChainTask, Problem


def worked_solution(task: ChainTask, problem: Problem, rng: random.Random | None = None) -> str:
    """Return a correct solution text; with ``rng``, one with errors that are then repaired."""
    return "".join(segment.text for segment in task.solution_segments(problem, rng))
