"""From a config to the parts of a run."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch

from qwen3_distill.config import (
    EmbeddedGeneration,
    EmbeddedTraining,
    LoraTuning,
    RunConfig,
    UnslothTraining,
    VllmGeneration,
)
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.generation.embedded.hosted import EmbeddedRolloutProcess
from qwen3_distill.generation.vllm.engine import VllmRolloutEngine
from qwen3_distill.hosts.mps import BELOW_NORMAL, PRIORITY_VARIABLE
from qwen3_distill.modeling.loading import resolve_dtype
from qwen3_distill.pipeline.assembly.channel import (
    build_channel,
    channel_folder,
    run_channel_folder,
)
from qwen3_distill.pipeline.assembly.data import build_checker, build_prompts, check_problems
from qwen3_distill.pipeline.assembly.plan import engine_log, plan_memory, require_plan
from qwen3_distill.pipeline.assembly.teachers import build_teacher
from qwen3_distill.pipeline.parts import Parts, TextTools
from qwen3_distill.planning.plan import MemoryPlan
from qwen3_distill.ports import (
    ReplayingLearner,
    StreamingRolloutEngine,
    TeacherScorer,
)
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.score_request import HiddenRequest, request_for
from qwen3_distill.training.embedded.hosted import EmbeddedLearnerProcess
from qwen3_distill.training.embedded.student import build_embedded_learner
from qwen3_distill.training.unsloth.learner import UnslothLearner
from qwen3_distill.weights.directory import publish_directory


def build_parts(config: RunConfig) -> Parts:
    """Open data, plan the memory and load the embedded engines; real ones wait for `start`."""
    text = TextTools(config.student.model)
    prompts = build_prompts(config, text)
    if config.evaluation is not None:
        check_problems(config, config.evaluation, text)
    plan = plan_memory(config)
    teacher = build_teacher(config, plan)
    scratch = run_channel_folder(config)
    return Parts(
        config=config,
        prompts=prompts,
        engine=build_engine(config, plan),
        teacher=teacher,
        learner=build_learner(config, teacher, plan),
        channel=build_channel(config, scratch),
        text=text,
        is_correct=build_checker(config.verifier, text) if config.verifier else None,
        scratch=scratch,
    )


def build_engine(
    config: RunConfig, plan: MemoryPlan | None, model_dir: str | None = None
) -> StreamingRolloutEngine:
    """The rollout engine, without weights: load a version before the first rollout.

    Args:
        model_dir: a model that is served as it is; default: the config's student.
    """
    generation = config.generation
    match generation:
        case EmbeddedGeneration(own_process=True):
            return EmbeddedRolloutProcess(
                model_dir or config.student.model, generation, log=engine_log(config, "rollouts")
            )
        case EmbeddedGeneration():
            return EmbeddedRolloutEngine(
                model_dir or config.student.model,
                device=generation.device,
                dtype=generation.dtype,
                max_sequences=generation.max_sequences,
            )
        case VllmGeneration():
            return VllmRolloutEngine(
                model_dir or config.student.model,
                _yielding(generation) if config.pipeline.mps else generation,
                lora=_served_adapter(config) if model_dir is None else None,
                kv_cache_bytes=require_plan(plan).vllm_kv_cache_bytes,
                log=engine_log(config, "vllm"),
            )


def _yielding(generation: VllmGeneration) -> VllmGeneration:
    """Decoding lets scoring and training go first, unless its environment says otherwise.

    So rollouts run ahead of the learner less and wait there less, and a decoding step serves more
    of them (docs/streaming.md has what was measured).
    """
    environment = {PRIORITY_VARIABLE: BELOW_NORMAL} | generation.environment
    return generation.model_copy(update={"environment": environment})


def _served_adapter(config: RunConfig) -> LoraTuning | None:
    """The tuning whose adapters travel by themselves; None where whole weights are pushed."""
    tuning, generation = config.training.tuning, config.generation
    swaps = generation.kind == "vllm" and generation.adapters == "swap"
    return tuning if swaps and isinstance(tuning, LoraTuning) else None


@asynccontextmanager
async def static_engine(config: RunConfig, model_dir: str) -> AsyncIterator[StreamingRolloutEngine]:
    """An engine that serves a directory's own weights as step 0."""
    scratch = channel_folder(config)
    channel = build_channel(config, scratch)
    engine = build_engine(config, plan_memory(config), model_dir)
    try:
        await engine.start()
        dtype = resolve_dtype(config.training.dtype)
        version = publish_directory(model_dir, channel, dtype=dtype)
        await engine.load(version, channel)
        yield engine
    finally:
        await engine.close()
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def build_learner(
    config: RunConfig, teacher: TeacherScorer, plan: MemoryPlan | None
) -> ReplayingLearner:
    """The learner, with the teacher's output head where the objective needs one."""
    training = config.training
    publish_adapter = _served_adapter(config) is not None
    match training:
        case EmbeddedTraining(own_process=True):
            return EmbeddedLearnerProcess(
                config.student.model,
                training,
                objective=config.objective,
                replay=config.replay,
                total_steps=config.steps,
                seed=config.seed,
                publish_adapter=publish_adapter,
                log=engine_log(config, "learner"),
            )
        case EmbeddedTraining():
            needs_head = isinstance(request_for(config.objective), HiddenRequest)
            return build_embedded_learner(
                config.student.model,
                training,
                config.objective,
                total_steps=config.steps,
                seed=config.seed,
                publish_adapter=publish_adapter,
                replay=config.replay,
                teacher_head_VD=_output_head(teacher) if needs_head else None,
            )
        case UnslothTraining():
            return UnslothLearner(
                config.student.model,
                training,
                objective=config.objective,
                total_steps=config.steps,
                seed=config.seed,
                publish_adapter=publish_adapter,
                memory_bytes=require_plan(plan).learner_memory_bytes,
                log=engine_log(config, "unsloth"),
                replay=config.replay,
            )


def _output_head(teacher: TeacherScorer) -> torch.Tensor | None:
    return teacher.output_head if isinstance(teacher, EmbeddedTeacher) else None
