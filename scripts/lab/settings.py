"""Sizes and schedules of the lab models."""

from dataclasses import dataclass

MAX_NEW_TOKENS = 96
GROUPED_BATCHES = 8
SAMPLING_BATCH = 256
SAMPLE_POOL_SIZE = 6144
# The student imitates the teacher's answers drawn at this temperature: it knows the task, and
# makes a mistake every few lines. At temperature 1 it would need the teacher's accuracy to imitate.
WARM_START_TEMPERATURE = 1.95


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of a Qwen3 model; head_dim is 32 for both models."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One training run: AdamW with linear warm-up and cosine decay to zero."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.01
    beta2: float = 0.98
    stop_after: int | None = None
    """Ends the run in the middle of its schedule, after this many steps."""


TEACHER_SHAPE = Shape(
    hidden_size=256, intermediate_size=384, layers=3, heads=8, kv_heads=4, tied=False
)
STUDENT_SHAPE = Shape(
    hidden_size=128, intermediate_size=256, layers=3, heads=4, kv_heads=2, tied=True
)
TEACHER_SCHEDULE = Schedule(steps=900, batch_size=64, learning_rate=2e-3, warmup_steps=50)
STUDENT_SCHEDULE = Schedule(steps=600, batch_size=64, learning_rate=3e-3, warmup_steps=50)

# The demo's student. It imitates few answers at temperature 1, and is taken in the middle of its
# schedule: its greedy accuracy is below 40%, so there is something to learn, not only noise to
# lose.
BEGINNER_POOL_SIZE = 1024
BEGINNER_TEMPERATURE = 1.0
BEGINNER_SCHEDULE = Schedule(
    steps=500, batch_size=64, learning_rate=3e-3, warmup_steps=50, stop_after=250
)
