"""Makes a run's first config: for a machine and two models, the largest settings that fit."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import check_config
from qwen3_distill.config.yaml12 import parse_yaml
from qwen3_distill.planning.config_text import config_text
from qwen3_distill.planning.facts import Facts
from qwen3_distill.planning.ladder import Rung, ladder
from qwen3_distill.planning.plan import ENGINES, MemoryPlan, lay_out, make_plan
from qwen3_distill.recording.text import gib

_RECOMPUTED = re.compile(r"(\d+) of \d+ layers recomputed")
_SMALLEST_WITHOUT = 4096
"""Tokens of a micro-batch below which recomputing layers of a larger one is the lesser loss."""


@dataclass(frozen=True, kw_only=True)
class InitialConfig:
    """A config for a machine, and its memory plan."""

    text: str
    config: RunConfig
    plan: MemoryPlan


def initial_config(facts: Facts) -> InitialConfig:
    """Choose the largest settings that fit: without a recomputed layer, if they are not too small.

    Raises:
        ConfigError: not even the smallest fit, or the teacher does not while it loads; with the
            plan and what would free memory.
    """
    rungs = list(ladder(facts.machine.kind, streaming=facts.wishes.streaming))
    tried = [_planned(facts, rung, rungs[0]) for rung in rungs]
    fitting = [one for one in tried if one.plan.fits]
    without = [
        one
        for one in fitting
        if recomputed_layers(one.plan) == 0
        and one.config.training.micro_batch_tokens >= _SMALLEST_WITHOUT
    ]
    chosen = next(iter([*without, *fitting, tried[-1]]))
    make_plan(
        chosen.config,
        device=facts.machine.device,
        student_shape=facts.student.shape,
        teacher_shape=facts.teacher.shape,
    )
    return chosen


def recomputed_layers(plan: MemoryPlan) -> int:
    """Return how many layers the learner recomputes in the backward pass."""
    found = (_RECOMPUTED.search(row.how) for row in plan.rows if row.engine == "learner")
    return next(int(match[1]) for match in found if match)


def _planned(facts: Facts, rung: Rung, first: Rung) -> InitialConfig:
    """Lay out one rung, then write its text with the plan in it."""
    config = check_config(parse_yaml(config_text(facts, rung, []), "init"), "init")
    plan = lay_out(
        config,
        device=facts.machine.device,
        student_shape=facts.student.shape,
        teacher_shape=facts.teacher.shape,
    )
    text = config_text(facts, rung, list(_plan_lines(facts, plan, rung, first)))
    return InitialConfig(text=text, config=config, plan=plan)


def _plan_lines(facts: Facts, plan: MemoryPlan, rung: Rung, first: Rung) -> Iterator[str]:
    """Say what the memory goes to, and what was lowered for it."""
    engines = ", ".join(f"{engine} {gib(plan.engine_bytes(engine))}" for engine in ENGINES)
    required, there = gib(plan.required_bytes), gib(plan.device.free_bytes)
    yield f"Memory by the plan, in GiB: {engines}, left free {gib(plan.reserve_bytes)};"
    layers = facts.student.shape.num_layers
    recomputed = recomputed_layers(plan)
    yield f"{required} of {there}. The learner recomputes {recomputed} of {layers} layers."
    if lowered := rung.lowered_from(first):
        yield "Lowered until it fitted: " + ", ".join(lowered[:3]) + ("," if lowered[3:] else ".")
        if lowered[3:]:
            yield "  " + ", ".join(lowered[3:]) + "."
    else:
        yield "Nothing had to be lowered to fit: max_sequences, the micro-batch and the teacher's"
        yield "requests are the largest that this project has a reason for."
