"""Learning rates as a function of the step."""

import math

from qwen3_distill.config import ScheduleConfig


def learning_rate_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """The factor of the peak learning rate at optimizer step ``step`` (from 0)."""
    if schedule.kind == "constant":
        return 1.0
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    decay_steps = max(1, total_steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / decay_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.final_fraction + (1 - schedule.final_fraction) * cosine
