"""The implementations that the contract suites run against. A new engine is one more entry."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import pytest
from torch import Tensor

from qwen3_distill.config import (
    EmbeddedTraining,
    FullTuning,
    ObjectiveConfig,
    OptimizerConfig,
    TuningConfig,
)
from qwen3_distill.generation.embedded import EmbeddedRolloutEngine
from qwen3_distill.protocols import Learner, RolloutEngine, TeacherScorer
from qwen3_distill.scoring.embedded import EmbeddedTeacher
from qwen3_distill.scoring.request import SampledRequest, ScoreRequest
from qwen3_distill.training.embedded import EmbeddedLearner
from qwen3_distill.training.objectives import build_objective

Device = Literal["cpu", "cuda"]


class EngineAdapter(Protocol):
    """Builds a `RolloutEngine`."""

    def build(self, model_dir: Path, *, max_sequences: int = 64) -> RolloutEngine: ...


class TeacherAdapter(Protocol):
    """Builds a `TeacherScorer`."""

    def build(
        self,
        model_dir: Path,
        request: ScoreRequest = SampledRequest(),  # noqa: B008 - frozen
        *,
        batch_tokens: int = 16384,
        chunk_tokens: int = 1024,
    ) -> TeacherScorer: ...


@dataclass(frozen=True, kw_only=True)
class LearnerSettings:
    """What a learner is built from, whichever engine trains."""

    objective: ObjectiveConfig
    teacher_head_VD: Tensor | None = None
    tuning: TuningConfig = field(default_factory=lambda: FullTuning(kind="full"))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    micro_batch_tokens: int = 8192
    chunk_tokens: int = 1024
    gradient_checkpointing: bool = False
    autocast: Literal["off", "bfloat16"] = "off"
    total_steps: int = 10
    seed: int = 0


class LearnerAdapter(Protocol):
    """Builds a `Learner`."""

    @property
    def bitwise_repeatable(self) -> bool:
        """Whether the same step gives the same bits twice."""
        ...

    def build(self, model_dir: Path, settings: LearnerSettings) -> Learner: ...


@dataclass(frozen=True)
class EmbeddedEngineAdapter:
    device: Device

    def build(self, model_dir: Path, *, max_sequences: int = 64) -> RolloutEngine:
        return EmbeddedRolloutEngine(
            model_dir, device=self.device, dtype="float32", max_sequences=max_sequences
        )


@dataclass(frozen=True)
class EmbeddedTeacherAdapter:
    device: Device

    def build(
        self,
        model_dir: Path,
        request: ScoreRequest = SampledRequest(),  # noqa: B008 - frozen
        *,
        batch_tokens: int = 16384,
        chunk_tokens: int = 1024,
    ) -> TeacherScorer:
        return EmbeddedTeacher(
            model_dir,
            request=request,
            device=self.device,
            dtype="float32",
            batch_tokens=batch_tokens,
            chunk_tokens=chunk_tokens,
        )


@dataclass(frozen=True)
class EmbeddedLearnerAdapter:
    device: Device

    @property
    def bitwise_repeatable(self) -> bool:
        return self.device == "cpu"  # the embedding's gradient on CUDA is added up in any order

    def build(self, model_dir: Path, settings: LearnerSettings) -> Learner:
        head_VD = settings.teacher_head_VD
        return EmbeddedLearner(
            model_dir,
            config=EmbeddedTraining(
                kind="embedded",
                device=self.device,
                autocast=settings.autocast,
                tuning=settings.tuning,
                optimizer=settings.optimizer,
                micro_batch_tokens=settings.micro_batch_tokens,
                chunk_tokens=settings.chunk_tokens,
                gradient_checkpointing=settings.gradient_checkpointing,
            ),
            objective=build_objective(
                settings.objective,
                teacher_head_VD=None if head_VD is None else head_VD.to(self.device),
                chunk_tokens=settings.chunk_tokens,
            ),
            total_steps=settings.total_steps,
            seed=settings.seed,
        )


ENGINES = [
    pytest.param(EmbeddedEngineAdapter("cpu"), id="embedded"),
    pytest.param(EmbeddedEngineAdapter("cuda"), id="embedded_cuda", marks=pytest.mark.gpu),
]
TEACHERS = [
    pytest.param(EmbeddedTeacherAdapter("cpu"), id="embedded"),
    pytest.param(EmbeddedTeacherAdapter("cuda"), id="embedded_cuda", marks=pytest.mark.gpu),
]
LEARNERS = [
    pytest.param(EmbeddedLearnerAdapter("cpu"), id="embedded"),
    pytest.param(EmbeddedLearnerAdapter("cuda"), id="embedded_cuda", marks=pytest.mark.gpu),
]
