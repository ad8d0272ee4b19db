"""The implementations that the contract suites run against. A new engine is one more entry."""

import atexit
import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest
import torch
from torch import Tensor

from qwen3_distill.config import (
    EmbeddedGeneration,
    EmbeddedTraining,
    FullTuning,
    ObjectiveConfig,
    OptimizerConfig,
    ReplayConfig,
    TuningConfig,
)
from qwen3_distill.errors import WeightVersionError
from qwen3_distill.generation.embedded import hosted as embedded_process
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.generation.embedded.hosted import EmbeddedRolloutProcess
from qwen3_distill.ports import ReplayingLearner, StreamingRolloutEngine, TeacherScorer
from qwen3_distill.replay.buffer import build_replay
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.score_request import SampledRequest, ScoreRequest
from qwen3_distill.training.embedded.student import EmbeddedLearner
from qwen3_distill.training.objectives.build import build_objective
from qwen3_distill.types import WeightVersion
from qwen3_distill.weights.memory import MemoryChannel
from tests.contract.builders import run
from tests.contract.sglang_adapter import SglangTeacherAdapter
from tests.contract.unsloth_adapter import UnslothLearnerAdapter
from tests.contract.vllm_adapter import VllmEngineAdapter
from tests.engines import LOGS

Device = Literal["cpu", "cuda"]


class EngineAdapter(Protocol):
    """Builds a `StreamingRolloutEngine`."""

    @property
    def keeps_cache_over_updates(self) -> bool:
        """Whether new weights go on with keys and values of the old; else they are recomputed."""
        ...

    def build(self, model_dir: Path, *, max_sequences: int = 64) -> StreamingRolloutEngine: ...


class TeacherAdapter(Protocol):
    """Builds a `TeacherScorer`, and says what may be expected of it."""

    @property
    def gives_hidden_states(self) -> bool:
        """Whether a `HiddenRequest` is answered; else it is refused."""
        ...

    @property
    def parity_nats(self) -> float:
        """How far a score may lie from a float32 forward pass."""
        ...

    @property
    def repeat_nats(self) -> float:
        """How far two scores of the same tokens may lie apart."""
        ...

    @property
    def tokens_that_show_a_fault(self) -> int:
        """In a response of so many tokens, a fault is larger than `parity_nats` somewhere."""
        ...

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
    max_model_tokens: int | None = None
    """Refused by engines that have no such setting."""
    gradient_checkpointing: bool = False
    autocast: Literal["off", "bfloat16"] = "off"
    publish_adapter: bool = False
    total_steps: int = 10
    seed: int = 0
    replay: ReplayConfig | None = None


class LearnerAdapter(Protocol):
    """Builds a `Learner`."""

    @property
    def bitwise_repeatable(self) -> bool:
        """Whether the same step gives the same bits twice."""
        ...

    @property
    def slack(self) -> float:
        """What the suite's tolerances, which are those of PyTorch on a CPU, are multiplied with."""
        ...

    def supports(self, objective: ObjectiveConfig) -> bool: ...

    def build(self, model_dir: Path, settings: LearnerSettings) -> ReplayingLearner: ...


@dataclass(frozen=True)
class EmbeddedEngineAdapter:
    device: Device
    keeps_cache_over_updates: bool = True

    def build(self, model_dir: Path, *, max_sequences: int = 64) -> StreamingRolloutEngine:
        return EmbeddedRolloutEngine(
            model_dir, device=self.device, dtype="float32", max_sequences=max_sequences
        )


@dataclass
class EmbeddedProcessAdapter:
    """The embedded engine in a process of its own; a start takes seconds, so the last are kept."""

    keeps_cache_over_updates: bool = True
    _kept: dict[tuple[str, int], EmbeddedRolloutProcess] = field(default_factory=dict)

    def build(self, model_dir: Path, *, max_sequences: int = 64) -> StreamingRolloutEngine:
        key = (str(model_dir), max_sequences)
        if not self._kept:
            atexit.register(self.close)
        engine = self._kept.pop(key, None)
        while len(self._kept) >= 3:
            run(self._kept.pop(next(iter(self._kept))).close())
        if engine is None:
            engine = build_embedded_process(model_dir, max_sequences=max_sequences)
        self._kept[key] = engine  # the last used stands last
        with contextlib.suppress(WeightVersionError):  # serves nothing from here on
            run(engine.load(WeightVersion(step=0, digest="absent"), MemoryChannel()))
        return engine

    def close(self) -> None:
        while self._kept:
            run(self._kept.popitem()[1].close())


def build_embedded_process(model_dir: Path, **changes: Any) -> EmbeddedRolloutProcess:
    """An engine of its own, started. Its steps are slow while a rollout of `LONG` tokens runs."""
    values = {"kind": "embedded", "device": "cpu", "own_process": True, "threads": 1}
    config = EmbeddedGeneration.model_validate(values | changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded_process, "_MODULE", "tests.contract.slow_embedded_worker")
        engine = EmbeddedRolloutProcess(model_dir, config, log=LOGS / "rollouts.log")
    run(engine.start())
    return engine


@dataclass(frozen=True)
class EmbeddedTeacherAdapter:
    device: Device
    gives_hidden_states: bool = True
    parity_nats: float = 1e-4
    """Between two float32 forward passes; 5e-6 was seen. A wrong shift is off by nats."""
    repeat_nats: float = 1e-5
    tokens_that_show_a_fault: int = 3

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

    @property
    def slack(self) -> float:
        return 1.0

    def supports(self, objective: ObjectiveConfig) -> bool:
        return True

    def build(self, model_dir: Path, settings: LearnerSettings) -> ReplayingLearner:
        head_VD, replay = settings.teacher_head_VD, settings.replay
        buffer = replay and build_replay(
            replay, settings.objective, device=torch.device(self.device), seed=settings.seed
        )
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
            publish_adapter=settings.publish_adapter,
            replay=buffer,
        )


ENGINES = [
    pytest.param(EmbeddedEngineAdapter("cpu"), id="embedded"),
    pytest.param(EmbeddedProcessAdapter(), id="embedded_process"),
    pytest.param(EmbeddedEngineAdapter("cuda"), id="embedded_cuda", marks=pytest.mark.gpu),
    pytest.param(VllmEngineAdapter(), id="vllm", marks=pytest.mark.vllm),
]
TEACHERS = [
    pytest.param(EmbeddedTeacherAdapter("cpu"), id="embedded"),
    pytest.param(EmbeddedTeacherAdapter("cuda"), id="embedded_cuda", marks=pytest.mark.gpu),
    pytest.param(SglangTeacherAdapter("stand_in"), id="sglang_stand_in"),
    pytest.param(SglangTeacherAdapter("real"), id="sglang", marks=pytest.mark.sglang),
    pytest.param(
        SglangTeacherAdapter("real", quantization="fp8"),
        id="sglang_fp8",
        marks=[pytest.mark.sglang, pytest.mark.gpu],
    ),
]
LEARNERS = [
    pytest.param(EmbeddedLearnerAdapter("cpu"), id="embedded"),
    pytest.param(EmbeddedLearnerAdapter("cuda"), id="embedded_cuda", marks=pytest.mark.gpu),
    pytest.param(UnslothLearnerAdapter(), id="unsloth", marks=pytest.mark.unsloth),
]
