"""The pipeline, checkpoints, logs and trackers of a run."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from qwen3_distill.config.base import (
    Gib,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Schema,
    Seconds,
)


class CheckpointConfig(Schema):
    """How often a checkpoint is saved. A crash costs at most ``every_steps`` steps."""

    every_steps: PositiveInt = 25
    keep_last: PositiveInt = 2


class WandbTracker(Schema):
    """Weights & Biases (extra ``[wandb]``)."""

    kind: Literal["wandb"]
    project: str
    offline: bool = False


class TrackioTracker(Schema):
    """trackio (extra ``[trackio]``)."""

    kind: Literal["trackio"]
    project: str


TrackerConfig: TypeAlias = Annotated[WandbTracker | TrackioTracker, Field(discriminator="kind")]


class LoggingConfig(Schema):
    """Settings of the files that a run writes in addition to ``metrics.jsonl``."""

    tensorboard: bool = True
    rollouts_every_steps: PositiveInt = 10
    """Save rollouts with their scores at every this many steps."""
    rollouts_per_save: PositiveInt = 16
    """Rollouts saved at such a step."""
    rollouts_kept_steps: PositiveInt | None = None
    """Keep saved rollouts of the last so many steps, and those of the first; null: whatever their
    age."""
    rollouts_kept_gib: Gib = 4.0
    """Keep at most this much of saved rollouts; the oldest go first, those of the first step
    stay."""
    trackers: tuple[TrackerConfig, ...] = ()
    trace: bool = True
    """Write ``trace.json``, the timeline of all stages, for ui.perfetto.dev and the report."""


class CostConfig(Schema):
    """Number and price of the run's devices, for its cost ledger; see docs/concepts/cost.md."""

    devices: PositiveInt = 1
    """Devices that the run holds: GPUs, those of servers in `scoring.urls` included; 1 on a CPU."""
    price_per_device_hour: NonNegativeFloat | None = None
    """Price of one device for an hour; null: no money is counted."""
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    """Currency of the price: three capital letters."""


class _Pipeline(Schema):
    mps: bool = False
    """Start an MPS daemon for the run, through which the engines' processes share the GPU: their
    kernels run concurrently, vLLM's with lower priority. Without a working daemon the run says so
    and continues."""


class SequentialPipeline(_Pipeline):
    """Generates, scores, trains and publishes in turn. Strictly on-policy."""

    kind: Literal["sequential"]


class OfflinePipeline(_Pipeline):
    """Collects rollouts and scores once, with the student as it is before the run, then trains on
    them in as many epochs as `steps` asks for. Epoch 0 takes them in order, later ones shuffled."""

    kind: Literal["offline"]
    collect_steps: PositiveInt | None = None
    """Number of steps whose rollouts are collected: `steps` / `collect_steps` is the number of
    epochs. Required unless rollouts.source=file, where the file is all there is."""


class PrefixBudget(Schema):
    """Limits most rollouts to their first tokens; the rest is never sampled."""

    tokens: PositiveInt
    """Maximum new tokens of a shortened rollout, if below `sampling.max_new_tokens`."""
    full_length_fraction: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of rollouts, chosen by number, that are sampled to their end. Only these teach the
    student where to stop."""


class Harvest(Schema):
    """Trains on the tokens that running rollouts have so far when a step's deadline passes."""

    deadline_s: Annotated[float, Field(ge=1e-6, le=1e7)]
    """Seconds after the previous step at which a step harvests the running rollouts."""
    min_tokens: PositiveInt = 32
    """A rollout is harvested only if it has at least this many tokens since its last harvest."""
    full_length_fraction: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of rollouts, chosen by number, that are never harvested."""


class StreamingPipeline(_Pipeline):
    """Generates, scores and trains concurrently; a rollout may span several steps."""

    kind: Literal["streaming"]
    max_staleness_steps: NonNegativeInt = 4
    """Maximum staleness of a rollout's oldest token; an older rollout is dropped and counted. 0 is
    strictly on-policy."""
    max_steps_ahead: NonNegativeInt | None = None
    """How many steps generation may run ahead of the next one; null: max_staleness_steps. If a few
    answers are much longer than the rest, a small number here with a large max_staleness_steps
    keeps most rollouts fresh without dropping the long ones."""
    max_in_flight: PositiveInt | None = None
    """Maximum rollouts in flight; null: generation.max_sequences."""
    pause_at_ready_steps: PositiveInt | None = None
    """While the learner steps, decoding pauses once finished rollouts for this many further steps
    wait: a decode batch that runs empty costs the device as much as a full one. Paused rollouts
    age, so leave max_staleness_steps some room. Null: decoding never pauses."""
    weight_updates: Literal["in_flight", "boundary"] = "in_flight"
    """``in_flight``: running rollouts continue with the new weights; every token records the
    version that sampled it. ``boundary``: no rollout is started until the running ones have ended
    and the new version is loaded."""
    scoring_calls: PositiveInt = 2
    """Maximum concurrent calls to the teacher; each takes all rollouts that wait for a score."""
    harvest: Harvest | None = None
    """Null: the run trains on finished rollouts only."""
    prefix: PrefixBudget | None = None
    """Null: every rollout is sampled to its end."""
    stall_timeout_s: Seconds = 1800.0
    """The run stops and says what it waited for if no rollout is finished or scored for this long,
    or if one call of a stage (scores, a step, new weights) takes this long."""


PipelineConfig: TypeAlias = Annotated[
    SequentialPipeline | StreamingPipeline | OfflinePipeline, Field(discriminator="kind")
]
