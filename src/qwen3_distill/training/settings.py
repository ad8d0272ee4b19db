"""The settings of a learner, whichever engine trains and wherever it runs.

No torch and no transformers here: a worker of unsloth imports this before unsloth.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

from qwen3_distill.config import (
    EmbeddedTraining,
    LoraTuning,
    ObjectiveConfig,
    ReplayConfig,
    UnslothTraining,
)

Training = TypeVar("Training", EmbeddedTraining, UnslothTraining)


@dataclass(frozen=True, kw_only=True)
class LearnerSettings(Generic[Training]):
    """One learner: what it trains, on which objective, and what it publishes."""

    model_dir: Path
    """The student."""
    training: Training
    objective: ObjectiveConfig
    total_steps: int
    seed: int
    replay: ReplayConfig | None = None
    """The buffer of kept rollouts; None: `update` alone trains."""
    publish_adapter: bool = False
    """Publish LoRA adapters by themselves, not merged into all weights."""
    memory_bytes: int | None = None
    """Device memory that an unsloth learner plans with; None: the config's, else what is free."""

    @property
    def max_model_tokens(self) -> int | None:
        """Longest prompt plus response; None: the student's context length."""
        training = self.training
        return training.max_model_tokens if isinstance(training, UnslothTraining) else None

    @property
    def published_adapter(self) -> LoraTuning | None:
        """The tuning whose adapters are published by themselves; None: whole weights are."""
        tuning = self.training.tuning
        return tuning if self.publish_adapter and isinstance(tuning, LoraTuning) else None

    def resolved(self) -> "LearnerSettings[Training]":
        """The same with an absolute path, for a process with another working directory."""
        return replace(self, model_dir=self.model_dir.resolve())


AnyLearnerSettings: TypeAlias = LearnerSettings[EmbeddedTraining] | LearnerSettings[UnslothTraining]
