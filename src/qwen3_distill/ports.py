"""The ports between the pipeline and the engines. No torch, no engine is imported here.

What an engine computes is awaited: an embedded engine computes inside the call, a real one waits
for its worker. Before `start`, only `identity` may be read; `close` may be called more than once,
and `start` after `close` begins anew. Engines may start concurrently, except a teacher whose memory
share is a fraction of what is free: start it first.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

from qwen3_distill.types import (
    Batch,
    ModelIdentity,
    Rollout,
    RolloutPrefix,
    RolloutRequest,
    ScoredRollout,
    ScoreResult,
    ScoringJob,
    Update,
    WeightVersion,
)

if TYPE_CHECKING:
    import torch

NamedWeights: TypeAlias = "Mapping[str, torch.Tensor]"
"""Hugging Face parameter names to tensors: every parameter of the student, tied ones once."""


@dataclass(frozen=True, kw_only=True)
class FullWeights:
    """A version as all of its weights. Its digest is `weights_digest` of the tensors."""

    tensors: NamedWeights


@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """A version as adapters on the student that the engine holds already.

    Its digest is `weights_digest` of the tensors.
    """

    tensors: NamedWeights
    """peft's names: ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``."""
    rank: int
    alpha: float
    target_modules: tuple[str, ...]


WeightPayload: TypeAlias = FullWeights | LoraWeights


Reach: TypeAlias = Literal["process", "machine", "cluster"]
"""Where a receiver of weights may be, seen from the learner, from near to far."""
_NEAR_TO_FAR: tuple[Reach, ...] = ("process", "machine", "cluster")


CACHED_TOKENS = "score/cached_tokens"
"""Counter of a teacher: tokens of jobs that it did not compute, because an engine had their keys
and values. Absent where an engine does not tell."""
STORED_TOKENS = "score/stored_tokens"
"""Counter of a teacher: tokens of jobs that nobody computed, because their scores were kept."""


class WeightChannel(Protocol):
    """Moves weights from the learner to engines, whole or not at all."""

    @property
    def reach(self) -> Reach:
        """How far away a receiver may be. From "machine" on the channel may be pickled and used in
        another process."""
        ...

    def publish(self, version: WeightVersion, payload: WeightPayload) -> None:
        """Make ``version`` fetchable. Older versions may disappear."""
        ...

    def fetch(self, version: WeightVersion) -> WeightPayload:
        """The weights of ``version``, bit for bit.

        Raises:
            WeightVersionError: ``version`` is not (or no longer) in the channel.
        """
        ...

    def adapter_directory(self, version: WeightVersion, folder: Path) -> Path:
        """A directory in peft's layout with the adapters of ``version``.

        The channel's own if it has one, else one that is written below ``folder``.

        Raises:
            WeightVersionError: the channel does not hold ``version`` as adapters.
        """
        ...

    def switched_transport(self, version: WeightVersion) -> bool:
        """Whether a receiver could not use the transport by which ``version`` was published.

        If so, the channel uses another one from now on: publish and load once more.
        """
        ...


def reaches(channel: WeightChannel, receiver: Reach) -> bool:
    """Whether a receiver at that distance can use the channel."""
    return _NEAR_TO_FAR.index(channel.reach) >= _NEAR_TO_FAR.index(receiver)


class Sampler(Protocol):
    """Answers prompts."""

    def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        """Sample every request once; yield each rollout when it has finished, in any order.

        Requests of one prompt should be adjacent, so that an engine can share the prompt's work.
        """
        ...


class RolloutEngine(Sampler, Protocol):
    """Samples from the student. Knows nothing of teachers, losses or steps."""

    async def start(self) -> None: ...

    @property
    def counters(self) -> Mapping[str, float]:
        """Counts since the start, by metric key: restarts, retries."""
        ...

    @property
    def version(self) -> WeightVersion:
        """The weights that a request made now would use.

        Raises:
            WeightVersionError: nothing has been loaded; there is no default version.
        """
        ...

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        """Serve ``version`` from now on, its digest read back from the weights in use.

        Raises:
            WeightVersionError: the weights in use are not ``version``.
        """
        ...

    async def close(self) -> None: ...


class StreamingRolloutEngine(RolloutEngine, Protocol):
    """A `RolloutEngine` that is never drained.

    Calls of `generate` may overlap: their requests are decoded together. `load` may come while
    rollouts run: they keep what they have and go on with the new weights, and every token's
    version is in the rollout's spans. When such a load fails, running rollouts end like aborted
    ones: there are no weights to go on with.
    """

    async def prefixes(self) -> list[RolloutPrefix]:
        """The tokens so far of every running rollout that has any; an engine may lag behind."""
        ...

    async def abort(self, rollout_ids: Sequence[str]) -> None:
        """End rollouts: `generate` does not yield them. Unknown ids are ignored."""
        ...

    async def pause(self) -> None:
        """Stop decoding until `resume`; rollouts keep their tokens, new requests wait."""
        ...

    async def resume(self) -> None: ...


@runtime_checkable
class StartsInTwo(Protocol):
    """An engine that can begin its start before it may take memory of the device."""

    async def prepare(self) -> None:
        """Do the part of `start` that takes no memory of the device; `start` does the rest.

        Raises:
            EngineStartError: the engine cannot be started.
        """
        ...


class TeacherScorer(Protocol):
    """Scores tokens under a teacher. Knows jobs, not rollouts (`scoring/views.py`)."""

    async def start(self) -> None: ...

    @property
    def counters(self) -> Mapping[str, float]:
        """Counts since the start, by metric key: restarts, retries."""
        ...

    @property
    def identity(self) -> ModelIdentity: ...

    @property
    def teacher_id(self) -> str:
        """Names the exact weights in use and their precision."""
        ...

    @property
    def max_dropped_fraction(self) -> float:
        """Share of a step's rollouts that may go without a score; more is an error."""
        ...

    @property
    def starts_first(self) -> bool:
        """Whether it must have its memory before other engines take any: its share is of what is
        free."""
        ...

    async def memory_taken(self) -> None:
        """Wait, while `start` runs, until it has taken its memory; without a sign of it, for ever.

        Only asked for where `starts_first`.
        """
        ...

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        """Score the tokens in every job's spans; one result per job, in the order given.

        A score that is missing, misaligned or not finite is never a `TeacherScore`: a job without a
        score after all retries is a `ScoreFailure`. Tokens outside the spans get no value.

        Raises:
            DataError: a job is longer than the teacher's context.
        """
        ...

    async def close(self) -> None: ...


class FollowingTeacher(TeacherScorer, Protocol):
    """A teacher whose weights follow the student's; they are a part of the run's state."""

    @property
    def initial_teacher_id(self) -> str:
        """Names the weights that the run begins with; `teacher_id` those in use now."""
        ...

    async def follow(self, version: WeightVersion, channel: WeightChannel) -> None:
        """Take a step's weights into account. Every step comes once; a repeated one is ignored.

        Raises:
            WeightVersionError: a step was left out, or the channel's weights are not ``version``.
        """
        ...

    async def reset(self) -> None:
        """Go back to the weights that the run begins with."""
        ...

    async def save_state(self, directory: Path) -> None:
        """Write everything that `load_state` needs to go on bit for bit."""
        ...

    async def load_state(self, directory: Path, version: WeightVersion) -> None:
        """Restore `save_state`'s files.

        Raises:
            CheckpointError: the files do not hold the state after ``version``.
        """
        ...


class Learner(Protocol):
    """Owns the trainable weights and the optimizer. Only it makes weight versions."""

    async def start(self) -> None:
        """Load the student as it was before the run; `load_state` then restores a later state."""
        ...

    @property
    def identity(self) -> ModelIdentity: ...

    @property
    def version(self) -> WeightVersion: ...

    @property
    def max_restarts(self) -> int:
        """How often per run a lost learner may be started again; 0 in the controller's process."""
        ...

    async def update(self, batch: Batch) -> Update:
        """Take one optimizer step.

        Raises:
            NonFiniteError: loss or gradient norm is not finite, and nothing was stepped; or the
                weights are not finite after the step, and every later call that would use them
                raises it again.
            LearnerLost: the learner's process died and its weights are lost; `start` it again and
                `load_state` of the newest checkpoint.
        """
        ...

    async def publish(self, channel: WeightChannel) -> WeightVersion:
        """Put the current weights into the channel."""
        ...

    async def save_state(self, directory: Path) -> None:
        """Write everything that `load_state` needs to go on bit for bit."""
        ...

    async def load_state(self, directory: Path, version: WeightVersion) -> None:
        """Restore `save_state`'s files.

        Raises:
            CheckpointError: the files do not hold ``version``.
        """
        ...

    async def save_student(self, directory: Path) -> None:
        """Write the student as a Hugging Face directory (adapters merged), tokenizer included."""
        ...

    async def close(self) -> None: ...


class ReplayingLearner(Learner, Protocol):
    """A learner that keeps scored rollouts on its device and trains on them more than once.

    The kept rollouts belong to its state: `save_state` and `load_state` include them.
    """

    async def admit(self, scored: Sequence[ScoredRollout]) -> None:
        """Keep rollouts for later updates; the oldest make room.

        Raises:
            DataError: one is longer than the learner accepts, or they do not fit an empty buffer.
            ConfigError: the learner was built without replay.
        """
        ...

    async def update_replayed(self, num_rollouts: int) -> Update:
        """Take one optimizer step on kept rollouts, drawn by the config's law.

        On all of them if there are fewer. Its metrics say how many, and what the buffer holds.

        Raises:
            DataError: no kept rollout is young enough.
            NonFiniteError: as for `update`; the rollouts stay as they were.
        """
        ...
