"""How a run is operated: pipeline, checkpoints, logs, trackers."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from qwen3_distill.config.base import PositiveFloat, PositiveInt, Schema


class CheckpointConfig(Schema):
    """What a crash can cost: at most ``every_steps`` steps."""

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
    """What a run writes beside ``metrics.jsonl``."""

    tensorboard: bool = True
    rollouts_every_steps: PositiveInt = 10
    """Save rollouts of every so many steps, with their scores."""
    rollouts_per_save: PositiveInt = 16
    """Rollouts kept of such a step."""
    trackers: tuple[TrackerConfig, ...] = ()
    trace: bool = True
    """Write ``trace.json``: what every stage did when, for ui.perfetto.dev and the report."""


class _Pipeline(Schema):
    mps: bool = False
    """Have the engines' processes share the GPU through an MPS daemon of the run's own, so that
    their kernels run side by side, those of vLLM after the others'. Where there is none to be had,
    the run says so and goes on."""


class SequentialPipeline(_Pipeline):
    """Generate, score, train, publish: one after another. Strictly on-policy."""

    kind: Literal["sequential"]


class PrefixBudget(Schema):
    """Train on the first tokens of most answers; the rest of those is never sampled."""

    tokens: PositiveInt
    """New tokens of a shortened rollout, where `sampling.max_new_tokens` allows more."""
    full_length_fraction: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of rollouts, drawn by their numbers, that are sampled to their end: only they show
    the student where to stop."""


class Harvest(Schema):
    """Train on what there is of running rollouts when a step's time is up."""

    deadline_s: PositiveFloat
    """Seconds after the step before, at which a step takes the prefixes of running rollouts."""
    min_tokens: PositiveInt = 32
    """A rollout with fewer tokens that were not harvested before is left alone."""
    full_length_fraction: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of rollouts, drawn by their numbers, that are never harvested."""


class StreamingPipeline(_Pipeline):
    """Generate, score and train at the same time: rollouts run on across steps."""

    kind: Literal["streaming"]
    max_staleness_steps: Annotated[int, Field(ge=0)] = 4
    """Age in optimizer steps up to which a rollout is trained on, judged by its oldest token; an
    older one is dropped and counted. 0 is strictly on-policy."""
    max_steps_ahead: Annotated[int, Field(ge=0)] | None = None
    """How far generation runs ahead of training: rollouts for at most so many steps beyond the
    coming one are out at a time; null: max_staleness_steps. Where a few answers are much longer
    than the rest, a small number here and a large max_staleness_steps keep the rest fresh and do
    not drop the few."""
    max_in_flight: PositiveInt | None = None
    """Rollouts that are sampled at a time; null: generation.max_sequences."""
    pause_at_ready_steps: PositiveInt | None = None
    """While the learner steps, decoding pauses once rollouts for so many further steps have ended:
    a decode batch that runs empty costs the device as much as a full one. What is paused ages, so
    leave max_staleness_steps some room. Null: it never pauses."""
    weight_updates: Literal["in_flight", "boundary"] = "in_flight"
    """``in_flight``: running rollouts go on with the new weights, and their tokens keep the
    version that sampled them. ``boundary``: a version is loaded when no rollout is running, and
    until then none is begun."""
    scoring_calls: PositiveInt = 2
    """Calls to the teacher under way at a time; each takes all rollouts that wait for a score."""
    harvest: Harvest | None = None
    """Null: only finished rollouts are trained on."""
    prefix: PrefixBudget | None = None
    """Null: every rollout is sampled to its end."""
    stall_timeout_s: PositiveFloat = 1800.0
    """With no rollout finished and none scored for so long, or a call of a stage (scores, a step,
    new weights) that takes so long, the run stops and says what it waited for."""


PipelineConfig: TypeAlias = Annotated[
    SequentialPipeline | StreamingPipeline, Field(discriminator="kind")
]
