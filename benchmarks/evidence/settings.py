"""The three settings, the models' sizes and the sizes of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen3_distill.config import TaskName

MODELS = Path("runs/evidence/models")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of a Qwen3 model with heads of 32 dimensions."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The models' sizes, and how long they are trained. Few layers: a decode step is launched
    layer by layer."""

    teacher: Shape
    student: Shape
    teacher_steps: int
    weak_steps: int
    warm_steps: int
    """Most steps of the warm start."""
    rows_divisor: int = 1
    """Batches of the teachers' training are this many times smaller than the setting's."""


GPU = Sizes(  # teacher 10.2 M parameters, student 2.4 M
    teacher=Shape(
        hidden_size=448, intermediate_size=1408, layers=4, heads=14, kv_heads=7, tied=False
    ),
    student=Shape(hidden_size=256, intermediate_size=768, layers=3, heads=8, kv_heads=4, tied=True),
    teacher_steps=5000,
    weak_steps=3000,
    warm_steps=3000,
)
CPU = Sizes(
    teacher=Shape(
        hidden_size=192, intermediate_size=512, layers=3, heads=6, kv_heads=3, tied=False
    ),
    student=Shape(hidden_size=96, intermediate_size=256, layers=3, heads=3, kv_heads=1, tied=True),
    teacher_steps=700,
    weak_steps=2000,
    warm_steps=1500,
    rows_divisor=4,
)
"""For one setting on two cores; the models are smaller than the protocol's."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A task, the warm start's data, and the budget of a run on it."""

    task: TaskName
    max_new_tokens: int
    warm_samples: int
    """Answers of the teacher, at temperature 1, that the student is warm-started on."""
    rollouts_per_step: int
    micro_batch_tokens: int
    teacher_rows: int
    """Problems in a batch of the teachers' training."""
    teacher_batches: int
    """How many of a round of the teachers' batches are of this task."""


SETTINGS: Mapping[str, Setting] = {
    "chain": Setting(
        task="long_chain",
        max_new_tokens=168,
        warm_samples=4096,
        rollouts_per_step=128,
        micro_batch_tokens=32768,
        teacher_rows=128,
        teacher_batches=3,
    ),
    "multiply": Setting(
        task="multiply",
        max_new_tokens=136,
        warm_samples=2048,
        rollouts_per_step=128,
        micro_batch_tokens=32768,
        teacher_rows=128,
        teacher_batches=2,
    ),
    "short": Setting(
        task="sum",
        max_new_tokens=8,
        warm_samples=8192,
        rollouts_per_step=512,
        micro_batch_tokens=32768,
        teacher_rows=1536,
        teacher_batches=2,
    ),
}

WARM_TARGET = 0.4
"""Greedy accuracy at which the warm start ends: something is left to learn, and to lose."""
WEAK_TARGET = 0.75
"""Mean accuracy over the settings, at temperature 1, at which the weak teacher's training ends."""
WARM_FIRST, VALIDATION_FIRST = 10_000_000, 20_000_000
"""Numbers of the training problems that are kept for the warm start and for choosing when it ends;
the arms draw theirs from 0 on."""
HELDOUT = 4096
"""Held-out problems of every counted evaluation."""
EVALUATION_STEPS = (4, 8, 14, 22, 35, 60, 100)
"""Steps after which a counted run is evaluated; the last is the budget. The accuracy at step 0 is
the warm-started student's, in ``models.json``."""
TRIAL_SEED, TRIAL_STEPS, TRIAL_HELDOUT = 1000, 50, 1024
"""A tuning trial's seed, which no counted run has, its steps, and its held-out problems."""
TRIAL_FIRST = 1_000_000
"""Number of the first held-out problem of a trial: counted evaluations have others."""
