"""The implementations that the contract suites run against. A new engine is one more entry."""

import atexit
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest
import torch
from torch import Tensor

from qwen3_distill.config import (
    EmbeddedGeneration,
    EmbeddedScoring,
    EmbeddedTraining,
    FullTuning,
    ObjectiveConfig,
    OptimizerConfig,
    RefreshedEvery,
    ReplayConfig,
    TuningConfig,
)
from qwen3_distill.errors import WeightVersionError
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.generation.embedded.hosted import hosted_embedded_engine
from qwen3_distill.generation.fleet import RolloutFleet
from qwen3_distill.generation.hosted import HostedRolloutEngine
from qwen3_distill.hosts.host import Host, MakeHost, WorkerSpec
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.hosts.ray_host import RayHost
from qwen3_distill.ports import ReplayingLearner, StreamingRolloutEngine, TeacherScorer
from qwen3_distill.scoring.embedded.ensemble import EmbeddedEnsemble
from qwen3_distill.scoring.embedded.following import FollowingEmbeddedTeacher
from qwen3_distill.scoring.embedded.hosted import hosted_embedded_teacher
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.training.embedded.hosted import hosted_embedded_learner
from qwen3_distill.training.embedded.student import build_embedded_learner
from qwen3_distill.training.group import GroupLearner
from qwen3_distill.training.settings import LearnerSettings, Training
from qwen3_distill.types import SampledRequest, ScoreRequest, WeightVersion
from qwen3_distill.weights.memory import MemoryChannel
from tests.contract.builders import directory_weights, published, run, with_module
from tests.contract.fleet_adapter import (
    RolloutFleetAdapter,
    TeacherFleetAdapter,
    ray_hosts,
    rollout_fleet,
    teacher_fleet,
    through_store,
)
from tests.contract.plain_teacher import PlainTeacherAdapter
from tests.contract.pooled_host import PooledHost
from tests.contract.served_adapter import SERVED_TEACHERS, Served, ServedTeacherAdapter
from tests.contract.socket_host import SocketHost
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
    def scores_given_candidates(self) -> bool:
        """Whether a `GivenCandidatesRequest` is answered; else it is refused."""
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
class LearnerCase:
    """A learner that a test asks for, whichever engine trains."""

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

    def settings(self, model_dir: Path, training: Training) -> LearnerSettings[Training]:
        return LearnerSettings(
            model_dir=model_dir,
            training=training,
            objective=self.objective,
            replay=self.replay,
            total_steps=self.total_steps,
            seed=self.seed,
            publish_adapter=self.publish_adapter,
        )


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

    def build(self, model_dir: Path, wanted: LearnerCase) -> ReplayingLearner: ...


@dataclass(frozen=True)
class EmbeddedEngineAdapter:
    device: Device
    batching: Literal["continuous", "static"] = "continuous"
    keeps_cache_over_updates: bool = True

    def build(self, model_dir: Path, *, max_sequences: int = 64) -> StreamingRolloutEngine:
        return EmbeddedRolloutEngine(
            model_dir,
            device=self.device,
            dtype="float32",
            max_sequences=max_sequences,
            batching=self.batching,
        )


@dataclass
class EmbeddedProcessAdapter:
    """The embedded engine in a host; a start takes seconds, so the last are kept."""

    make_host: MakeHost = LocalProcess
    keeps_cache_over_updates: bool = True
    _kept: dict[tuple[str, int], HostedRolloutEngine] = field(default_factory=dict)

    def build(self, model_dir: Path, *, max_sequences: int = 64) -> StreamingRolloutEngine:
        key = (str(model_dir), max_sequences)
        if not self._kept:
            atexit.register(self.close)
        engine = self._kept.pop(key, None)
        while len(self._kept) >= 3:
            run(self._kept.pop(next(iter(self._kept))).close())
        if engine is None:
            engine = build_embedded_process(model_dir, self.make_host, max_sequences=max_sequences)
        self._kept[key] = engine  # the last used stands last
        with contextlib.suppress(WeightVersionError):  # serves nothing from here on
            run(engine.load(WeightVersion(step=0, digest="absent"), MemoryChannel()))
        return engine

    def close(self) -> None:
        while self._kept:
            run(self._kept.popitem()[1].close())


def build_embedded_process(
    model_dir: Path, make_host: MakeHost = LocalProcess, **changes: Any
) -> HostedRolloutEngine:
    """An engine of its own, started. Its steps are slow while a rollout of `LONG` tokens runs."""
    values = {"kind": "embedded", "device": "cpu", "own_process": True, "threads": 1}
    engine = hosted_embedded_engine(
        model_dir,
        EmbeddedGeneration.model_validate(values | changes),
        log=LOGS / "rollouts.log",
        make_host=with_module("tests.contract.slow_embedded_worker", make_host),
    )
    run(engine.start())
    return engine


@dataclass(frozen=True)
class EmbeddedTeacherAdapter:
    device: Device
    gives_hidden_states: bool = True
    scores_given_candidates: bool = True
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
class EnsembleAdapter(EmbeddedTeacherAdapter):
    """The mean of a teacher with itself, which is that teacher."""

    gives_hidden_states: bool = False

    def build(
        self,
        model_dir: Path,
        request: ScoreRequest = SampledRequest(),  # noqa: B008 - frozen
        *,
        batch_tokens: int = 16384,
        chunk_tokens: int = 1024,
    ) -> TeacherScorer:
        sizes = {"batch_tokens": batch_tokens, "chunk_tokens": chunk_tokens}
        members = [
            EmbeddedTeacher(
                model_dir, request=SampledRequest(), device=self.device, dtype="float32", **sizes
            )
            for _ in range(2)
        ]
        return EmbeddedEnsemble(members, (0.25, 0.75), request=request, **sizes)


@dataclass(frozen=True)
class FollowingTeacherAdapter(EmbeddedTeacherAdapter):
    """A teacher that took its weights from a student after a step: those of its directory."""

    device: Device = "cpu"

    def build(
        self,
        model_dir: Path,
        request: ScoreRequest = SampledRequest(),  # noqa: B008 - frozen
        *,
        batch_tokens: int = 16384,
        chunk_tokens: int = 1024,
    ) -> TeacherScorer:
        built = super().build(
            model_dir, request, batch_tokens=batch_tokens, chunk_tokens=chunk_tokens
        )
        assert isinstance(built, EmbeddedTeacher)
        teacher = FollowingEmbeddedTeacher(built, RefreshedEvery(kind="every", steps=1))
        with torch.no_grad():
            for tensor in built.weights.values():
                tensor.zero_()
        run(teacher.follow(*published(directory_weights(model_dir), 1)))
        return teacher


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

    def build(self, model_dir: Path, wanted: LearnerCase) -> ReplayingLearner:
        head_VD = wanted.teacher_head_VD
        return build_embedded_learner(
            wanted.settings(model_dir, embedded_training(wanted, device=self.device)),
            teacher_head_VD=None if head_VD is None else head_VD.to(self.device),
        )


def embedded_training(wanted: LearnerCase, **changes: Any) -> EmbeddedTraining:
    values = {
        "kind": "embedded",
        "autocast": wanted.autocast,
        "tuning": wanted.tuning,
        "optimizer": wanted.optimizer,
        "micro_batch_tokens": wanted.micro_batch_tokens,
        "chunk_tokens": wanted.chunk_tokens,
        "gradient_checkpointing": wanted.gradient_checkpointing,
    }
    return EmbeddedTraining.model_validate(values | changes)


# --- In a cluster of three nodes ----------------------------------------------------------------


@dataclass
class ClusterRolloutsAdapter:
    """Two replicas on nodes of a Ray cluster; a start takes seconds, so the last are kept."""

    keeps_cache_over_updates: bool = True
    _kept: dict[tuple[str, int], RolloutFleet] = field(default_factory=dict)

    def build(self, model_dir: Path, *, max_sequences: int = 64) -> StreamingRolloutEngine:
        key = (str(model_dir), max_sequences)
        fleet = self._kept.pop(key, None)
        while len(self._kept) >= 2:
            run(self._kept.pop(next(iter(self._kept))).close())
        if fleet is None:
            hosts: dict[int, RayHost] = {}
            replicas = [
                hosted_embedded_engine(
                    model_dir,
                    EmbeddedGeneration(
                        kind="embedded",
                        device="cpu",
                        own_process=True,
                        threads=1,
                        max_sequences=max_sequences,
                        max_restarts=0,
                    ),
                    log=LOGS / f"cluster-rollouts-{i}.log",
                    make_host=with_module(
                        "tests.contract.slow_embedded_worker", ray_hosts(hosts, i)
                    ),
                )
                for i in range(2)
            ]
            fleet = rollout_fleet(replicas, deliver=through_store(hosts))
        self._kept[key] = fleet
        with contextlib.suppress(WeightVersionError):  # serves nothing from here on
            run(fleet.load(WeightVersion(step=0, digest="absent"), MemoryChannel()))
        return fleet


@dataclass(frozen=True)
class ClusterTeachersAdapter(EmbeddedTeacherAdapter):
    """Two teachers on nodes of a Ray cluster."""

    device: Device = "cpu"

    def build(
        self,
        model_dir: Path,
        request: ScoreRequest = SampledRequest(),  # noqa: B008 - frozen
        *,
        batch_tokens: int = 16384,
        chunk_tokens: int = 1024,
    ) -> TeacherScorer:
        config = EmbeddedScoring(
            kind="embedded",
            model=str(model_dir),
            device="cpu",
            dtype="float32",
            batch_tokens=batch_tokens,
            chunk_tokens=chunk_tokens,
            own_process=True,
            threads=1,
        )
        teachers = [
            hosted_embedded_teacher(
                config,
                request=request,
                log=LOGS / f"cluster-teacher-{i}.log",
                make_host=pooled("tests.contract.teacher_pool_worker", ray_hosts({}, i), f"-{i}"),
            )
            for i in range(2)
        ]
        return teacher_fleet(teachers)


# --- On the far side of a TCP socket ------------------------------------------------------------


def pooled(module: str, make_host: MakeHost, suffix: str = "") -> MakeHost:
    """A worker that shares a process with others of its kind, and of the same suffix."""

    def make(spec: WorkerSpec) -> Host:
        pool = replace(spec, name=f"{spec.name} pool{suffix}", module=module)
        return PooledHost(spec.name, make_host, pool)

    return make


def pooled_over_socket(module: str) -> MakeHost:
    """A worker that shares a process on the far side with others of its kind."""
    return pooled(module, SocketHost)


@dataclass(frozen=True)
class SocketTeacherAdapter(EmbeddedTeacherAdapter):
    """The embedded teacher over a `SocketHost`."""

    device: Device = "cpu"
    pool_module: str = "tests.contract.teacher_pool_worker"

    def build(
        self,
        model_dir: Path,
        request: ScoreRequest = SampledRequest(),  # noqa: B008 - frozen
        *,
        batch_tokens: int = 16384,
        chunk_tokens: int = 1024,
    ) -> TeacherScorer:
        config = EmbeddedScoring(
            kind="embedded",
            model=str(model_dir),
            device=self.device,
            dtype="float32",
            batch_tokens=batch_tokens,
            chunk_tokens=chunk_tokens,
            own_process=True,
            threads=1,
        )
        teacher = hosted_embedded_teacher(
            config,
            request=request,
            log=LOGS / "far-teacher.log",
            make_host=pooled_over_socket(self.pool_module),
        )
        run(teacher.start())
        return teacher


@dataclass(frozen=True)
class SocketLearnerAdapter(EmbeddedLearnerAdapter):
    """The embedded learner over a `SocketHost`."""

    device: Device = "cpu"
    pool_module: str = "tests.contract.learner_pool_worker"

    def supports(self, objective: ObjectiveConfig) -> bool:
        """Objectives over the teacher's hidden states stay in one process."""
        if objective.kind == "sampled_reverse_kl":
            return objective.kl_baseline.kind != "full"
        return objective.kind != "full"

    def build(self, model_dir: Path, wanted: LearnerCase) -> ReplayingLearner:
        training = embedded_training(wanted, device="cpu", own_process=True, threads=1)
        learner = hosted_embedded_learner(
            wanted.settings(model_dir, training),
            log=LOGS / "far-learner.log",
            make_host=pooled_over_socket(self.pool_module),
        )
        run(learner.start())
        return learner


@dataclass(frozen=True)
class GroupLearnerAdapter(SocketLearnerAdapter):
    """Embedded learners that take each step together: a rank each in two pools."""

    num_ranks: int = 2

    def build(self, model_dir: Path, wanted: LearnerCase) -> ReplayingLearner:
        group = build_group(wanted.settings(model_dir, group_training(wanted)), self.num_ranks)
        run(group.start())
        return group


def group_training(wanted: LearnerCase) -> EmbeddedTraining:
    return embedded_training(wanted, device="cpu", own_process=True, threads=1)


def build_group(
    settings: LearnerSettings[EmbeddedTraining],
    num_ranks: int,
    make_host: Callable[[int], MakeHost] | None = None,
) -> GroupLearner:
    """Make a group whose ranks are in pools of their own, so that they compute concurrently."""
    host_of = make_host or pooled_rank
    ranks = [
        hosted_embedded_learner(settings, log=LOGS / f"rank{rank}.log", make_host=host_of(rank))
        for rank in range(num_ranks)
    ]
    return GroupLearner(ranks, timeout_s=60.0)


def pooled_rank(rank: int) -> MakeHost:
    def make(spec: WorkerSpec) -> Host:
        pool = replace(spec, name=f"rank {rank} pool", module="tests.contract.learner_pool_worker")
        return PooledHost(spec.name, LocalProcess, pool)

    return make


@dataclass(frozen=True)
class ClusterLearnerAdapter(GroupLearnerAdapter):
    """A group of two ranks, each in a place of a Ray cluster."""

    def build(self, model_dir: Path, wanted: LearnerCase) -> ReplayingLearner:
        settings = wanted.settings(model_dir, group_training(wanted))
        group = build_group(settings, self.num_ranks, ray_rank)
        run(group.start())
        return group


def ray_rank(rank: int) -> MakeHost:
    return pooled("tests.contract.learner_pool_worker", ray_hosts({}, rank), f"-rank-{rank}")


ENGINES = [
    pytest.param(EmbeddedEngineAdapter("cpu"), id="embedded"),
    pytest.param(EmbeddedEngineAdapter("cpu", "static"), id="embedded_static"),
    pytest.param(EmbeddedProcessAdapter(), id="embedded_process"),
    pytest.param(EmbeddedProcessAdapter(SocketHost), id="embedded_over_socket"),
    pytest.param(RolloutFleetAdapter(3), id="fleet_of_three"),
    pytest.param(ClusterRolloutsAdapter(), id="cluster_fleet", marks=pytest.mark.cluster),
    pytest.param(EmbeddedEngineAdapter("cuda"), id="embedded_cuda", marks=pytest.mark.gpu),
    pytest.param(
        EmbeddedEngineAdapter("cuda", "static"), id="embedded_static_cuda", marks=pytest.mark.gpu
    ),
    pytest.param(VllmEngineAdapter(), id="vllm", marks=pytest.mark.vllm),
]
TEACHERS = [
    pytest.param(EmbeddedTeacherAdapter("cpu"), id="embedded"),
    pytest.param(EnsembleAdapter("cpu"), id="embedded_ensemble"),
    pytest.param(FollowingTeacherAdapter(), id="following"),
    pytest.param(SocketTeacherAdapter(), id="embedded_over_socket"),
    pytest.param(TeacherFleetAdapter(3), id="fleet_of_three"),
    pytest.param(ClusterTeachersAdapter(), id="cluster_fleet", marks=pytest.mark.cluster),
    pytest.param(
        PlainTeacherAdapter(pooled("tests.contract.plain_teacher_pool_worker", LocalProcess)),
        id="plain",
    ),
    pytest.param(EmbeddedTeacherAdapter("cuda"), id="embedded_cuda", marks=pytest.mark.gpu),
    *SERVED_TEACHERS,
    pytest.param(
        ServedTeacherAdapter(Served("sglang", "real"), quantization="fp8"),
        id="sglang_fp8",
        marks=[pytest.mark.sglang, pytest.mark.gpu],
    ),
]
LEARNERS = [
    pytest.param(EmbeddedLearnerAdapter("cpu"), id="embedded"),
    pytest.param(SocketLearnerAdapter(), id="embedded_over_socket"),
    pytest.param(GroupLearnerAdapter(), id="group_of_two"),
    pytest.param(ClusterLearnerAdapter(), id="cluster", marks=pytest.mark.cluster),
    pytest.param(EmbeddedLearnerAdapter("cuda"), id="embedded_cuda", marks=pytest.mark.gpu),
    pytest.param(UnslothLearnerAdapter(), id="unsloth", marks=pytest.mark.unsloth),
]
