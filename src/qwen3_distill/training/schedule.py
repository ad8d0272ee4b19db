"""The learning rate as a function of the step."""

import math

from qwen3_distill.config import OptimizerConfig, ScheduleConfig


def learning_rate_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return the factor of the peak learning rate at optimizer step ``step`` (from 0)."""
    if schedule.kind == "constant":
        return 1.0
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    decay_steps = max(1, total_steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / decay_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.final_fraction + (1 - schedule.final_fraction) * cosine


def extended_rate(
    optimizer: OptimizerConfig, step: int, earlier_steps: int, total_steps: int
) -> str:
    """State what becomes of the learning rate when a run at ``step`` gets more steps."""
    if optimizer.schedule.kind == "constant":
        return "the learning rate stays constant"
    before, now = (
        optimizer.learning_rate * learning_rate_factor(optimizer.schedule, step, total)
        for total in (earlier_steps, total_steps)
    )
    return (
        f"the learning rate goes on along the warm-up and cosine of {total_steps} steps: "
        f"{now:.3g} at the next step (that of {earlier_steps} steps: {before:.3g}). The steps "
        "before were trained with the shorter one, so the result is not that of a run of "
        f"{total_steps} steps from the start"
    )
