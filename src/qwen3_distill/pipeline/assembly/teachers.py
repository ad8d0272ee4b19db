"""Builds teachers, and samplers that answer as one."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Literal

import torch

from qwen3_distill.config import (
    EmbeddedGeneration,
    EmbeddedScoring,
    MovingAverage,
    PlanningConfig,
    RefreshedEvery,
    RunConfig,
    ScoringConfig,
    ServedScoring,
    SglangScoring,
    VllmScoring,
)
from qwen3_distill.errors import ConfigError
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.hosts.host import MakeHost
from qwen3_distill.modeling.loading import resolve_dtype
from qwen3_distill.pipeline.assembly.channel import learns_elsewhere, samples_elsewhere
from qwen3_distill.pipeline.assembly.fleet import RunCluster, require_cluster
from qwen3_distill.pipeline.assembly.plan import engine_log, plan_memory, require_plan
from qwen3_distill.planning.plan import MemoryPlan, fraction_of_free_memory
from qwen3_distill.ports import FollowingTeacher, Sampler, TeacherScorer
from qwen3_distill.scoring.cache import CachedTeacher
from qwen3_distill.scoring.context import ContextComparison, ContextView
from qwen3_distill.scoring.embedded.following import FollowingEmbeddedTeacher
from qwen3_distill.scoring.embedded.hosted import hosted_embedded_teacher
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.fleet import TeacherFleet
from qwen3_distill.scoring.sampling import TeacherSampler
from qwen3_distill.scoring.served.hosted import HostedServedTeacher
from qwen3_distill.scoring.served.teacher import ServedTeacher
from qwen3_distill.scoring.sglang.hosted import hosted_sglang_teacher
from qwen3_distill.scoring.sglang.teacher import SglangTeacher
from qwen3_distill.scoring.views import SameView, TeacherView
from qwen3_distill.scoring.vllm.hosted import hosted_vllm_teacher
from qwen3_distill.scoring.vllm.teacher import VllmTeacher
from qwen3_distill.types import SampledRequest, ScoreRequest, TopKRequest
from qwen3_distill.weights.directory import publish_directory
from qwen3_distill.weights.memory import MemoryChannel

_AUDIT_BATCH_TOKENS = 16384
_AUDIT_CHUNK_TOKENS = 1024


def build_view(config: RunConfig) -> TeacherView:
    """Build the view of the config's teacher."""
    scoring = config.scoring
    return SameView() if scoring is None or scoring.context is None else ContextView()


def require_frozen_teacher(config: RunConfig) -> None:
    """Check that the teacher stays as it is at the start, for a stage that runs by itself.

    Raises:
        ConfigError: it follows the student.
    """
    refresh = None if config.scoring is None else config.scoring.refresh
    if refresh is not None and refresh.kind != "never":
        raise ConfigError(
            f"scoring.refresh.kind={refresh.kind}: the teacher follows the student during a run, "
            "and this stage has none to follow; set scoring.refresh={kind: never}, or use "
            "`qwen3-distill run`"
        )


def build_teacher(
    config: RunConfig,
    plan: MemoryPlan | None,
    cluster: RunCluster | None = None,
    request: ScoreRequest | None = None,
) -> TeacherScorer:
    """Build the teacher.

    Args:
        cluster: where the teachers of ``cluster.teachers`` run.
        request: what it is asked for; default: what the objective needs.

    Raises:
        ConfigError: the config has such teachers, and there is no cluster for them.
    """
    # The default's last part is that of a teacher that only samples.
    request = request or config.objective.score_request or SampledRequest()
    if config.cluster is None or config.cluster.teachers is None:
        return _build_local_teacher(config, plan, request)
    fleet = require_cluster(cluster, "teachers").teacher_fleet(
        lambda member, make_host, suffix: _build_member(member, plan, request, make_host, suffix)
    )
    scoring = config.teacher
    if isinstance(scoring, ServedScoring) and scoring.cache:
        return CachedTeacher(fleet, request, scoring.cache)
    return fleet


def _build_member(
    config: RunConfig,
    plan: MemoryPlan | None,
    request: ScoreRequest,
    make_host: MakeHost,
    suffix: str,
) -> TeacherScorer:
    """Build one teacher of a fleet."""
    scoring = config.teacher
    if isinstance(scoring, EmbeddedScoring):
        log = engine_log(config, f"teacher{suffix}")
        return hosted_embedded_teacher(scoring, request=request, log=log, make_host=make_host)
    plan = require_plan(plan)
    if isinstance(scoring, VllmScoring):
        return hosted_vllm_teacher(
            scoring,
            request=request,
            kv_cache_bytes=plan.teacher_cache_bytes,
            log=engine_log(config, f"vllm-teacher{suffix}"),
            make_host=make_host,
        )
    return hosted_sglang_teacher(
        scoring,
        request=request,
        memory_fraction=_memory_fraction(scoring, config.planning, plan),
        max_total_tokens=plan.sglang_max_total_tokens,
        log=engine_log(config, f"sglang{suffix}"),
        make_host=make_host,
    )


def _build_local_teacher(
    config: RunConfig, plan: MemoryPlan | None, request: ScoreRequest
) -> TeacherScorer:
    scoring = config.teacher
    match scoring:
        case EmbeddedScoring(own_process=True):
            return hosted_embedded_teacher(
                scoring, request=request, log=engine_log(config, "teacher")
            )
        case EmbeddedScoring():
            teacher = EmbeddedTeacher(
                scoring.model,
                request=request,
                device=scoring.device,
                dtype=scoring.dtype,
                batch_tokens=scoring.batch_tokens,
                chunk_tokens=scoring.chunk_tokens,
            )
            if isinstance(scoring.refresh, RefreshedEvery | MovingAverage):
                return FollowingEmbeddedTeacher(teacher, scoring.refresh)
            return teacher
        case SglangScoring() | VllmScoring():
            teacher = _served(config, scoring, require_plan(plan), request)
            return CachedTeacher(teacher, request, scoring.cache) if scoring.cache else teacher


def _served(
    config: RunConfig,
    scoring: SglangScoring | VllmScoring,
    plan: MemoryPlan,
    request: ScoreRequest,
) -> ServedTeacher:
    if isinstance(scoring, VllmScoring):
        return VllmTeacher(
            scoring,
            request=request,
            kv_cache_bytes=plan.teacher_cache_bytes,
            log=engine_log(config, "vllm-teacher"),
        )
    return SglangTeacher(
        scoring,
        request=request,
        memory_fraction=_memory_fraction(scoring, config.planning, plan),
        max_total_tokens=plan.sglang_max_total_tokens,
        log=engine_log(config, "sglang"),
    )


def _memory_fraction(
    scoring: SglangScoring, planning: PlanningConfig, plan: MemoryPlan
) -> float | Callable[[], float]:
    """The server's share of the free memory.

    A planned share is computed at every start: at a restart the other engines hold memory too.
    """
    if scoring.memory_fraction is not None:
        return scoring.memory_fraction
    if planning.device_memory_gib is not None:  # a stated size says nothing of what is free
        return plan.sglang_memory_fraction
    return partial(fraction_of_free_memory, plan)


def with_embedded_teacher_here(config: RunConfig) -> RunConfig:
    """Copy the config with its embedded teacher, if any, in this process.

    Its `teacher_id` and output head are then known without starting it.
    """
    scoring = config.loaded_teacher
    if not isinstance(scoring, EmbeddedScoring):
        return config
    here = scoring.model_copy(update={"own_process": False, "threads": None})
    return config.model_copy(update={"scoring": here})


@asynccontextmanager
async def teacher_sampler(
    config: RunConfig, teacher: TeacherScorer | None
) -> AsyncIterator[Sampler]:
    """Open a sampler that answers as the teacher: the scoring server, or an embedded engine."""
    server = _server_of(teacher)
    if isinstance(server, HostedServedTeacher):
        yield server
        return
    if isinstance(server, ServedTeacher):
        yield server.sampler()
        return
    scoring = config.teacher
    assert isinstance(scoring, EmbeddedScoring)
    generation = config.generation
    embedded = generation if isinstance(generation, EmbeddedGeneration) else None
    engine = await _embedded_sampler(
        scoring,
        device=embedded.device if embedded else scoring.device,
        dtype=embedded.dtype if embedded else scoring.dtype,
        max_sequences=generation.max_sequences,
        batching=embedded.batching if embedded else "continuous",
    )
    threads = torch.get_num_threads()
    is_alone = samples_elsewhere(generation) and learns_elsewhere(config.training)
    if scoring.threads is not None and is_alone:
        torch.set_num_threads(scoring.threads)
    try:
        yield engine
    finally:
        torch.set_num_threads(threads)


async def _embedded_sampler(
    scoring: EmbeddedScoring,
    *,
    device: str,
    dtype: str,
    max_sequences: int,
    batching: Literal["continuous", "static"] = "continuous",
) -> EmbeddedRolloutEngine:
    engine = EmbeddedRolloutEngine(
        scoring.model,
        device=device,
        dtype=dtype,
        max_sequences=max_sequences,
        batching=batching,
    )
    channel = MemoryChannel()
    version = publish_directory(scoring.model, channel, dtype=resolve_dtype(scoring.dtype))
    await engine.load(version, channel)
    return engine


def _server_of(teacher: TeacherScorer | None) -> TeacherScorer | None:
    """Return the teacher that answers: without its cache, and of a fleet the first."""
    server = teacher.inner if isinstance(teacher, CachedTeacher) else teacher
    return server.teachers[0] if isinstance(server, TeacherFleet) else server


def build_teacher_rollouts(
    config: RunConfig, teacher: TeacherScorer | None
) -> TeacherSampler | None:
    """Build what samples the teacher's answers to train on; None if the teacher samples none.

    The scoring server samples itself. An embedded engine loads the teacher a second time, where
    and as it is scored with.
    """
    if "teacher" not in config.rollouts.samplers:
        return None
    assert teacher is not None, "a teacher that samples is loaded"

    @asynccontextmanager
    async def opened() -> AsyncIterator[Sampler]:
        server = _server_of(teacher)
        if isinstance(server, HostedServedTeacher):
            yield server
            return
        if isinstance(server, ServedTeacher):
            yield server.sampler()
            return
        scoring = config.teacher
        assert isinstance(scoring, EmbeddedScoring)
        engine = await _embedded_sampler(
            scoring,
            device=scoring.device,
            dtype=scoring.dtype,
            max_sequences=config.generation.max_sequences,
        )
        try:
            yield engine
        finally:
            await engine.close()

    return TeacherSampler(teacher, opened)


def each_server(config: RunConfig, request: ScoreRequest) -> dict[str, TeacherScorer]:
    """Build a teacher per existing server, by its URL; none where the run starts its own."""
    scoring = config.loaded_teacher
    if not isinstance(scoring, ServedScoring) or not scoring.urls:
        return {}  # and no plan: it would find the memory that the run's own engines hold
    alone = {
        url: scoring.model_copy(update={"urls": (url,), "cache": None}) for url in scoring.urls
    }
    plan = plan_memory(config)
    return {
        url: _build_local_teacher(config.model_copy(update={"scoring": section}), plan, request)
        for url, section in alone.items()
    }


def asked_at(teacher: TeacherScorer, temperature: float) -> TeacherScorer | None:
    """Return the teacher with another temperature in its requests; None if they have none."""
    return teacher.asked_at(temperature) if isinstance(teacher, ServedTeacher) else None


def output_head(teacher: TeacherScorer | None) -> torch.Tensor | None:
    """Return [V, D], the teacher's output head, where it is in this process."""
    is_here = isinstance(teacher, EmbeddedTeacher | FollowingEmbeddedTeacher)
    return teacher.output_head if is_here else None


def following(teacher: TeacherScorer | None) -> FollowingTeacher | None:
    """Return the teacher if its weights follow the student's."""
    return teacher if isinstance(teacher, FollowingEmbeddedTeacher) else None


def build_comparison(config: RunConfig) -> ContextComparison | None:
    """Build the comparison of the teacher with and without its context; None if it has none."""
    context = None if config.scoring is None else config.scoring.context
    if context is None:
        return None
    return ContextComparison(
        every_steps=context.compare_every_steps, num_rollouts=context.compare_rollouts
    )


def build_audited_teacher(config: RunConfig, request: TopKRequest) -> TeacherScorer:
    """Build the configured teacher for a precision audit: without its cache, with ``request``."""
    scoring = config.teacher
    if isinstance(scoring, EmbeddedScoring):
        return _embedded(scoring.model, request, device=scoring.device, dtype=scoring.dtype)
    plan = require_plan(plan_memory(config))
    if isinstance(scoring, VllmScoring):
        return _served(config, scoring, plan, request)
    return SglangTeacher(
        scoring,
        request=request,
        memory_fraction=plan.sglang_memory_fraction,
        max_total_tokens=plan.sglang_max_total_tokens,
        log=engine_log(config, "sglang"),
    )


def build_unquantized_teacher(
    scoring: ScoringConfig, model_dir: str, request: TopKRequest
) -> TeacherScorer:
    """Build the embedded teacher that a precision audit compares the configured one with.

    An embedded teacher already has the precision that its config asks for, so it is compared with
    the same weights in float32.
    """
    dtype = "float32" if isinstance(scoring, EmbeddedScoring) else scoring.dtype
    return _embedded(model_dir, request, device=scoring.device, dtype=dtype)


def _embedded(model_dir: str, request: TopKRequest, *, device: str, dtype: str) -> EmbeddedTeacher:
    return EmbeddedTeacher(
        model_dir,
        request=request,
        device=device,
        dtype=dtype,
        batch_tokens=_AUDIT_BATCH_TOKENS,
        chunk_tokens=_AUDIT_CHUNK_TOKENS,
    )
