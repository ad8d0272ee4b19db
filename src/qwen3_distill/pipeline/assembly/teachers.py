"""Builds teachers, and samplers that answer as one."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Literal

import torch

from qwen3_distill.config import (
    EmbeddedGeneration,
    EmbeddedScoring,
    EnsembleScoring,
    MovingAverage,
    NamedTeacher,
    PlanningConfig,
    RefreshedEvery,
    RunConfig,
    ServedScoring,
    SeveralScoring,
    SglangScoring,
    TeachersConfig,
    VllmScoring,
)
from qwen3_distill.errors import ConfigError
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.hosts.host import MakeHost
from qwen3_distill.modeling.loading import resolve_dtype
from qwen3_distill.pipeline.assembly.channel import learns_elsewhere, samples_elsewhere
from qwen3_distill.pipeline.assembly.fleet import RunCluster, require_cluster
from qwen3_distill.pipeline.assembly.plan import engine_log, plan_memory, require_plan
from qwen3_distill.pipeline.manifest import identity_record
from qwen3_distill.planning.plan import MemoryPlan, fraction_of_free_memory
from qwen3_distill.ports import FollowingTeacher, Sampler, TeacherScorer
from qwen3_distill.scoring.by_tag import (
    SamplerByTag,
    TagSampler,
    TeacherSamplersByTag,
    TeachersByTag,
)
from qwen3_distill.scoring.cache import CachedTeacher
from qwen3_distill.scoring.context import ContextComparison
from qwen3_distill.scoring.embedded.ensemble import EmbeddedEnsemble
from qwen3_distill.scoring.embedded.following import FollowingEmbeddedTeacher
from qwen3_distill.scoring.embedded.hosted import hosted_embedded_teacher
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.ensemble import EnsembleTeacher
from qwen3_distill.scoring.fleet import TeacherFleet
from qwen3_distill.scoring.sampling import TeacherSampler
from qwen3_distill.scoring.served.hosted import HostedServedTeacher
from qwen3_distill.scoring.served.teacher import ServedTeacher
from qwen3_distill.scoring.sglang.hosted import hosted_sglang_teacher
from qwen3_distill.scoring.sglang.teacher import SglangTeacher
from qwen3_distill.scoring.vllm.hosted import hosted_vllm_teacher
from qwen3_distill.scoring.vllm.teacher import VllmTeacher
from qwen3_distill.types import SampledRequest, ScoreRequest
from qwen3_distill.weights.directory import publish_directory
from qwen3_distill.weights.memory import MemoryChannel


def require_frozen_teacher(config: RunConfig) -> None:
    """Check that the teacher stays as it is at the start, for a stage that runs by itself.

    Raises:
        ConfigError: it follows the student.
    """
    teacher = config.only_teacher
    refresh = None if teacher is None else teacher.refresh
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
        return build_local(config, plan, request)
    fleet = require_cluster(cluster, "teachers").teacher_fleet(
        lambda member, make_host, suffix: _build_member(member, plan, request, make_host, suffix)
    )
    scoring = config.teacher
    if isinstance(scoring, ServedScoring) and scoring.cache:
        return CachedTeacher(fleet, request, scoring.cache)
    return fleet


def build_local(config: RunConfig, plan: MemoryPlan | None, request: ScoreRequest) -> TeacherScorer:
    """Build the teacher on this machine, or all of several."""
    scoring = config.scoring
    if isinstance(scoring, SeveralScoring):
        return TeachersByTag(
            {
                tag: _build_tagged(config, teachers_below(config, tag), section, plan, request)
                for tag, section in scoring.teachers.items()
            }
        )
    assert scoring is not None, "a teacher that is loaded has a section"
    return _build_tagged(config, config.teachers, scoring, plan, request)


def teachers_below(config: RunConfig, tag: str) -> tuple[NamedTeacher, ...]:
    """Return a tag's teacher, or the members of its ensemble."""
    return tuple(one for one in config.teachers if one.name.partition(".")[0] == tag)


def _build_tagged(
    config: RunConfig,
    teachers: Sequence[NamedTeacher],
    section: TeachersConfig,
    plan: MemoryPlan | None,
    request: ScoreRequest,
) -> TeacherScorer:
    """Build the teacher of a tag, or the only one: one engine, or an ensemble of them."""
    if not isinstance(section, EnsembleScoring):
        (teacher,) = teachers
        return _build_named(config, teacher, plan, request)
    if isinstance(request, SampledRequest):
        members = [_build_named(config, teacher, plan, request) for teacher in teachers]
        return EnsembleTeacher(members, section.shares)
    here = [_build_named(config, teacher, plan, request) for teacher in teachers]
    embedded = [member for member in here if isinstance(member, EmbeddedTeacher)]
    assert len(embedded) == len(here), "a rule requires members of this process"
    first = section.members[0]
    assert isinstance(first, EmbeddedScoring)
    return EmbeddedEnsemble(
        embedded,
        section.shares,
        request=request,
        batch_tokens=first.batch_tokens,
        chunk_tokens=first.chunk_tokens,
    )


def _build_named(
    config: RunConfig, teacher: NamedTeacher, plan: MemoryPlan | None, request: ScoreRequest
) -> TeacherScorer:
    own = None if plan is None else plan.for_teacher(teacher.name)
    return _build_local_teacher(config.with_teacher(teacher), own, request, teacher.suffix)


def teacher_records(teacher: TeacherScorer) -> dict[str, dict[str, Any]]:
    """Return what the manifest says of the teacher, and of every teacher by its tag."""
    named = {"id": teacher.teacher_id, **identity_record(teacher.identity)}
    if not isinstance(teacher, TeachersByTag):
        return {"teacher": named}
    each = {tag: teacher_records(one)["teacher"] for tag, one in teacher.teachers.items()}
    return {"teacher": named, "teachers": each}


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
    config: RunConfig, plan: MemoryPlan | None, request: ScoreRequest, suffix: str = ""
) -> TeacherScorer:
    """Build the one teacher of a config.

    Args:
        suffix: of its log file's name.
    """
    scoring = config.teacher
    match scoring:
        case EmbeddedScoring(own_process=True):
            return hosted_embedded_teacher(
                scoring, request=request, log=engine_log(config, f"teacher{suffix}")
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
            teacher = build_served(config, scoring, require_plan(plan), request, suffix)
            return CachedTeacher(teacher, request, scoring.cache) if scoring.cache else teacher


def build_served(
    config: RunConfig,
    scoring: SglangScoring | VllmScoring,
    plan: MemoryPlan,
    request: ScoreRequest,
    suffix: str,
) -> ServedTeacher:
    """Build the teacher in servers.

    Args:
        suffix: of its log file's name.
    """
    if isinstance(scoring, VllmScoring):
        return VllmTeacher(
            scoring,
            request=request,
            kv_cache_bytes=plan.teacher_cache_bytes,
            log=engine_log(config, f"vllm-teacher{suffix}"),
        )
    return SglangTeacher(
        scoring,
        request=request,
        memory_fraction=_memory_fraction(scoring, config.planning, plan),
        max_total_tokens=plan.sglang_max_total_tokens,
        log=engine_log(config, f"sglang{suffix}"),
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
    """Copy the config with its embedded teachers, if any, in this process.

    Their `teacher_id` and output head are then known without starting them.
    """
    return config.with_sections(
        {
            teacher.name: teacher.section.model_copy(update={"own_process": False, "threads": None})
            for teacher in config.loaded_teachers
            if isinstance(teacher.section, EmbeddedScoring)
        }
    )


@asynccontextmanager
async def teacher_sampler(
    config: RunConfig, teacher: TeacherScorer | None
) -> AsyncIterator[Sampler]:
    """Open a sampler that answers as the teacher: the scoring server, or an embedded engine.

    Of several teachers, every prompt's own one answers.
    """
    if config.tags:
        async with AsyncExitStack() as stack:
            samplers: dict[str, Sampler] = {}
            for tag, one in _by_tag(config):
                opened = teacher_sampler(one, _of_tag(teacher, tag))
                samplers[tag] = await stack.enter_async_context(opened)
            yield SamplerByTag(samplers)
        return
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


def _by_tag(config: RunConfig) -> list[tuple[str, RunConfig]]:
    """Every tag with a config that has its teacher alone."""
    found: list[tuple[str, RunConfig]] = []
    for tag in config.tags:
        (teacher,) = teachers_below(config, tag)  # a rule: an ensemble samples nothing
        found.append((tag, config.with_teacher(teacher)))
    return found


def _of_tag(teacher: TeacherScorer | None, tag: str) -> TeacherScorer | None:
    return teacher.teachers[tag] if isinstance(teacher, TeachersByTag) else None


def _server_of(teacher: TeacherScorer | None) -> TeacherScorer | None:
    """Return the teacher that answers: without its cache, and of a fleet the first."""
    server = teacher.inner if isinstance(teacher, CachedTeacher) else teacher
    return server.teachers[0] if isinstance(server, TeacherFleet) else server


def build_teacher_rollouts(config: RunConfig, teacher: TeacherScorer | None) -> TagSampler | None:
    """Build what samples the teacher's answers to train on; None if the teacher samples none.

    The scoring server samples itself. An embedded engine loads the teacher a second time, where
    and as it is scored with. Of several teachers, every prompt's own one answers.
    """
    if "teacher" not in config.rollouts.samplers:
        return None
    assert teacher is not None, "a teacher that samples is loaded"
    if config.tags:
        samplers = {
            tag: build_teacher_rollouts(one, _of_tag(teacher, tag)) for tag, one in _by_tag(config)
        }
        return TeacherSamplersByTag({tag: one for tag, one in samplers.items() if one})

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
    if config.tags:
        return {}  # the servers of different teachers give different scores
    scoring = config.loaded_teacher if len(config.loaded_teachers) == 1 else None
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
    """Return the teacher with another temperature in its requests; None if they have none.

    Of several teachers, those without one are asked as before.
    """
    if isinstance(teacher, ServedTeacher):
        return teacher.asked_at(temperature)
    if isinstance(teacher, TeachersByTag):
        others = {tag: asked_at(one, temperature) for tag, one in teacher.teachers.items()}
        if any(other is not None for other in others.values()):
            return TeachersByTag({tag: others[tag] or teacher.teachers[tag] for tag in others})
    return None


def output_head(teacher: TeacherScorer | None) -> torch.Tensor | None:
    """Return [V, D], the teacher's output head, where it is in this process."""
    is_here = isinstance(teacher, EmbeddedTeacher | FollowingEmbeddedTeacher)
    return teacher.output_head if is_here else None


def following(teacher: TeacherScorer | None) -> FollowingTeacher | None:
    """Return the teacher if its weights follow the student's."""
    return teacher if isinstance(teacher, FollowingEmbeddedTeacher) else None


def build_comparison(config: RunConfig) -> ContextComparison | None:
    """Build the comparison of the teacher with and without its context; None if it has none."""
    teacher = config.only_teacher
    context = None if teacher is None else teacher.context
    if context is None:
        return None
    return ContextComparison(
        every_steps=context.compare_every_steps, num_rollouts=context.compare_rollouts
    )
