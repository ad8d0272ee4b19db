"""The ports between the pipeline and the engines. No torch, no engine is imported here.

What an engine computes is awaited: an embedded engine computes inside the call, a real one waits
for its process. `close` may be called more than once.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from qwen3_distill.types import (
    Batch,
    ModelIdentity,
    Rollout,
    RolloutRequest,
    TeacherScore,
    Update,
    WeightVersion,
)

if TYPE_CHECKING:
    import torch

NamedWeights: TypeAlias = "Mapping[str, torch.Tensor]"
"""Hugging Face parameter names to tensors: every parameter of the student, tied ones once."""


class WeightChannel(Protocol):
    """Moves named weights from the learner to engines, whole or not at all."""

    def publish(self, version: WeightVersion, weights: NamedWeights) -> None:
        """Make ``version`` fetchable. Older versions may disappear."""
        ...

    def fetch(self, version: WeightVersion) -> NamedWeights:
        """The weights of ``version``, bit for bit.

        Raises:
            WeightVersionError: ``version`` is not (or no longer) in the channel.
        """
        ...


class RolloutEngine(Protocol):
    """Samples from the student. Knows nothing of teachers, losses or steps."""

    @property
    def version(self) -> WeightVersion:
        """Weights that a request admitted now would use.

        Raises:
            WeightVersionError: nothing was loaded yet; there is no default version.
        """
        ...

    async def load(self, version: WeightVersion, channel: WeightChannel) -> None:
        """Serve ``version`` from now on, its digest read back from the weights in use.

        Raises:
            WeightVersionError: the weights in use are not ``version``.
        """
        ...

    def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        """Sample every request once; yield each rollout as it finishes, in any order.

        Requests of one prompt should be adjacent, so that an engine can share the prompt's work.
        """
        ...

    async def close(self) -> None: ...


class TeacherScorer(Protocol):
    """Scores given tokens under a frozen teacher."""

    @property
    def identity(self) -> ModelIdentity: ...

    @property
    def teacher_id(self) -> str:
        """Names the exact weights and their precision."""
        ...

    async def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        """One score per rollout, in the order given."""
        ...

    async def close(self) -> None: ...


class Learner(Protocol):
    """Owns the trainable weights and the optimizer. Only it makes weight versions."""

    @property
    def identity(self) -> ModelIdentity: ...

    @property
    def version(self) -> WeightVersion: ...

    async def update(self, batch: Batch) -> Update:
        """One optimizer step.

        Raises:
            NonFiniteError: loss or gradient norm is not finite; nothing was stepped.
        """
        ...

    async def publish(self, channel: WeightChannel) -> WeightVersion:
        """Put the current weights into the channel."""
        ...

    async def save_state(self, directory: Path) -> None:
        """Write all that `load_state` needs to go on bit for bit."""
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
