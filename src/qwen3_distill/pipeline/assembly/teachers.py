"""From a config to its teacher."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch

from qwen3_distill.config import (
    EmbeddedGeneration,
    EmbeddedScoring,
    RunConfig,
    SglangScoring,
)
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.modeling.loading import resolve_dtype
from qwen3_distill.pipeline.assembly.channel import learns_elsewhere, samples_elsewhere
from qwen3_distill.pipeline.assembly.plan import engine_log, require_plan
from qwen3_distill.planning.device import detect_memory
from qwen3_distill.planning.plan import MemoryPlan
from qwen3_distill.ports import (
    Sampler,
    TeacherScorer,
)
from qwen3_distill.scoring.cache import CachedTeacher
from qwen3_distill.scoring.embedded.hosted import EmbeddedTeacherProcess
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.score_request import request_for
from qwen3_distill.scoring.sglang.teacher import SglangTeacher
from qwen3_distill.weights.directory import publish_directory
from qwen3_distill.weights.memory import MemoryChannel


def build_teacher(config: RunConfig, plan: MemoryPlan | None) -> TeacherScorer:
    """The scorer, asked for what the objective needs."""
    scoring = config.scoring
    request = request_for(config.objective)
    match scoring:
        case EmbeddedScoring(own_process=True):
            return EmbeddedTeacherProcess(
                scoring, request=request, log=engine_log(config, "teacher")
            )
        case EmbeddedScoring():
            return EmbeddedTeacher(
                scoring.model,
                request=request,
                device=scoring.device,
                dtype=scoring.dtype,
                batch_tokens=scoring.batch_tokens,
                chunk_tokens=scoring.chunk_tokens,
            )
        case SglangScoring():
            teacher = SglangTeacher(
                scoring,
                request=request,
                memory_fraction=_teacher_share(config, require_plan(plan)),
                max_total_tokens=require_plan(plan).sglang_max_total_tokens,
                log=engine_log(config, "sglang"),
            )
            return CachedTeacher(teacher, request, scoring.cache) if scoring.cache else teacher


def _teacher_share(config: RunConfig, plan: MemoryPlan) -> float | Callable[[], float]:
    """The server's share of what is free, asked at every start: started again, it is not alone."""
    if config.scoring.kind == "sglang" and config.scoring.memory_fraction is not None:
        return config.scoring.memory_fraction
    stated = config.planning.device_memory_gib is not None
    if stated:  # of no use beside engines that are there
        return plan.sglang_memory_fraction
    return lambda: plan.teacher_memory_fraction(detect_memory().free_bytes)


@asynccontextmanager
async def teacher_sampler(config: RunConfig, teacher: TeacherScorer) -> AsyncIterator[Sampler]:
    """Something that answers as the teacher: the server that scores, or an embedded engine."""
    server = teacher.inner if isinstance(teacher, CachedTeacher) else teacher
    if isinstance(server, SglangTeacher):
        yield server.sampler()
        return
    scoring = config.scoring
    assert isinstance(scoring, EmbeddedScoring)
    generation = config.generation
    embedded = generation if isinstance(generation, EmbeddedGeneration) else None
    engine = EmbeddedRolloutEngine(
        scoring.model,
        device=embedded.device if embedded else scoring.device,
        dtype=embedded.dtype if embedded else scoring.dtype,
        max_sequences=generation.max_sequences,
    )
    channel = MemoryChannel()
    version = publish_directory(scoring.model, channel, dtype=resolve_dtype(scoring.dtype))
    await engine.load(version, channel)
    threads = torch.get_num_threads()
    if scoring.threads is not None and samples_elsewhere(config) and learns_elsewhere(config):
        torch.set_num_threads(scoring.threads)  # nothing else here computes meanwhile
    try:
        yield engine
    finally:
        torch.set_num_threads(threads)


def in_this_process(config: RunConfig) -> RunConfig:
    """The config with an embedded teacher that is there when it is built, for its id."""
    scoring = config.scoring
    if not isinstance(scoring, EmbeddedScoring):
        return config
    here = scoring.model_copy(update={"own_process": False, "threads": None})
    return config.model_copy(update={"scoring": here})
