"""Makes a run's first config: for a machine and two models, the largest settings that fit."""

import re
import textwrap
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
_FEW = 0.1
"""Share of the layers that may be recomputed in place of a smaller micro-batch. All of them cost a
third of the learner's time, so a tenth costs 3%, as much as half a micro-batch does
(docs/measured/h200-stages.md)."""
_COLUMNS = 96


@dataclass(frozen=True, kw_only=True)
class InitialConfig:
    """A config for a machine, and its memory plan."""

    text: str
    config: RunConfig
    plan: MemoryPlan
    num_layers: int
    """Layers of the student."""


def initial_config(facts: Facts) -> InitialConfig:
    """Choose the largest settings that fit, with few layers recomputed where that is possible.

    Raises:
        ConfigError: not even the smallest fit, or the teacher does not while it loads; with the
            plan and what would free memory.
    """
    rungs = list(ladder(facts.machine.kind, streaming=facts.wishes.streaming))
    tried: list[InitialConfig] = []
    for rung in rungs:
        tried.append(_planned(facts, rung, rungs[0]))
        if tried[-1].plan.fits and _is_quick(tried[-1]):
            chosen = tried[-1]
            break
    else:
        chosen = next((one for one in tried if one.plan.fits), tried[-1])
    make_plan(
        chosen.config,
        device=facts.machine.device,
        student_shape=facts.student.shape,
        teacher_shape=facts.teacher.shape,
    )
    return chosen


def _is_quick(made: InitialConfig) -> bool:
    """Whether few layers are recomputed, and micro-batches are not small for it."""
    few = recomputed_layers(made.plan) <= _FEW * made.num_layers
    return few and made.config.training.micro_batch_tokens >= _SMALLEST_WITHOUT


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
    return InitialConfig(
        text=text, config=config, plan=plan, num_layers=facts.student.shape.num_layers
    )


def _plan_lines(facts: Facts, plan: MemoryPlan, rung: Rung, first: Rung) -> Iterator[str]:
    """Say what the memory goes to, and what was lowered for it."""
    engines = ", ".join(f"{engine} {gib(plan.engine_bytes(engine))}" for engine in ENGINES)
    required, there = gib(plan.required_bytes), gib(plan.device.free_bytes)
    layers = f"{recomputed_layers(plan)} of {facts.student.shape.num_layers} layers"
    yield f"Memory by the plan, in GiB: {engines}, left free {gib(plan.reserve_bytes)};"
    yield f"{required} of {there}. The learner recomputes {layers}."
    lowered = ", ".join(rung.lowered_from(first))
    text = (
        f"Lowered until it fitted: {lowered}." if lowered else "Nothing had to be lowered to fit."
    )
    yield from textwrap.wrap(text, _COLUMNS, break_long_words=False)
