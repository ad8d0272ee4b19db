"""Builds the parts of a run, its rollout engine and its learner."""

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

from qwen3_distill.config import (
    EmbeddedGeneration,
    EmbeddedTraining,
    GenerationConfig,
    LoraTuning,
    RunConfig,
    SglangScoring,
    TuningConfig,
    UnslothTraining,
    VllmGeneration,
    VllmScoring,
)
from qwen3_distill.environments.installed import engine_python
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.generation.embedded.hosted import hosted_embedded_engine
from qwen3_distill.generation.vllm.engine import vllm_engine
from qwen3_distill.hosts.host import MakeHost
from qwen3_distill.hosts.mps import BELOW_NORMAL, PRIORITY_VARIABLE
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.modeling.loading import resolve_dtype
from qwen3_distill.pipeline.assembly.channel import (
    build_channel,
    channel_folder,
    loads_beside_steps,
    run_channel_folder,
    samples_elsewhere,
)
from qwen3_distill.pipeline.assembly.data import (
    build_checker,
    build_prompts,
    check_problems,
    data_record,
)
from qwen3_distill.pipeline.assembly.fleet import RunCluster, ignore, require_cluster
from qwen3_distill.pipeline.assembly.plan import engine_log, plan_memory, require_plan
from qwen3_distill.pipeline.assembly.teachers import (
    build_comparison,
    build_teacher,
    build_teacher_rollouts,
    following,
    output_head,
    teacher_sampler,
)
from qwen3_distill.pipeline.assembly.views import view_for_prompts
from qwen3_distill.pipeline.manifest import EngineInterpreter
from qwen3_distill.pipeline.parts import Parts, TextTools
from qwen3_distill.pipeline.verification import BackgroundVerifier
from qwen3_distill.planning.plan import MemoryPlan
from qwen3_distill.ports import (
    ReplayingLearner,
    Sampler,
    StreamingRolloutEngine,
    TeacherScorer,
)
from qwen3_distill.training.embedded.hosted import hosted_embedded_learner
from qwen3_distill.training.embedded.student import build_embedded_learner
from qwen3_distill.training.hosted import HostedLearner
from qwen3_distill.training.settings import LearnerSettings, Training
from qwen3_distill.training.unsloth.learner import unsloth_learner
from qwen3_distill.types import HiddenRequest, ScoreRequest
from qwen3_distill.weights.directory import publish_directory


def build_parts(
    config: RunConfig,
    warn: Callable[[str], None] = ignore,
    score_request: ScoreRequest | None = None,
) -> Parts:
    """Open the data, plan the memory and build the engines.

    An embedded engine loads its model now, all others at `Parts.start`.

    Args:
        warn: told of engines of a fleet that are lost during the run.
        score_request: what the teacher is asked for; default: what the objective needs.
    """
    text = TextTools(config.student.model)
    prompts = build_prompts(config, text)
    evaluation = config.evaluation
    problems = check_problems(config.student, evaluation, text) if evaluation else None
    plan = plan_memory(config)
    cluster = None if config.cluster is None else RunCluster(config, config.cluster, warn)
    teacher = None
    if config.loaded_teachers:
        teacher_plan = plan if cluster is None else plan_memory(config, "teacher")
        teacher = build_teacher(config, teacher_plan, cluster, score_request)
    scratch = run_channel_folder(config)
    channel = build_channel(config, scratch)
    return Parts(
        config=config,
        prompts=prompts,
        engine=build_engine(
            config, plan_memory(config, "student") if cluster else plan, cluster=cluster
        ),
        teacher=teacher,
        view=view_for_prompts(config, prompts.source),
        learner=build_learner(config, teacher, plan, cluster),
        channel=channel,
        text=text,
        verifier=BackgroundVerifier(build_checker(config.verifier, text))
        if config.verifier
        else None,
        teacher_sampler=partial(teacher_sampler, config, teacher),
        teacher_rollouts=build_teacher_rollouts(config, teacher),
        samples_elsewhere=samples_elsewhere(config.generation),
        loads_beside_steps=loads_beside_steps(config),
        data=data_record(config, prompts, problems),
        scratch=scratch,
        cluster=cluster,
        following=following(teacher),
        comparison=build_comparison(config),
    )


def build_engine(
    config: RunConfig,
    plan: MemoryPlan | None,
    model_dir: str | None = None,
    *,
    cluster: RunCluster | None = None,
) -> StreamingRolloutEngine:
    """Build the rollout engine. It has no weights: load a version before the first rollout.

    Args:
        model_dir: a model that is served without adapters; default: the config's student.
        cluster: where the engines of ``cluster.rollouts`` run.

    Raises:
        ConfigError: the config has such engines, and there is no cluster for them.
    """
    if config.cluster is None or config.cluster.rollouts is None:
        return build_one_engine(config, plan, model_dir)
    members = require_cluster(cluster, "rollouts")
    return members.rollout_fleet(
        lambda member, make_host, name: build_one_engine(
            member, plan, model_dir, make_host=make_host, suffix=name
        )
    )


def build_one_engine(
    config: RunConfig,
    plan: MemoryPlan | None,
    model_dir: str | None = None,
    *,
    make_host: MakeHost = LocalProcess,
    suffix: str = "",
) -> StreamingRolloutEngine:
    """Build one rollout engine.

    Args:
        make_host: where it runs, if it has a process of its own.
        suffix: of its log file's name.
    """
    generation = config.generation
    match generation:
        case EmbeddedGeneration(own_process=True):
            return hosted_embedded_engine(
                model_dir or config.student.model,
                generation,
                log=engine_log(config, f"rollouts{suffix}"),
                make_host=make_host,
            )
        case EmbeddedGeneration():
            return EmbeddedRolloutEngine(
                model_dir or config.student.model,
                device=generation.device,
                dtype=generation.dtype,
                max_sequences=generation.max_sequences,
                batching=generation.batching,
            )
        case VllmGeneration():
            return vllm_engine(
                model_dir or config.student.model,
                with_low_gpu_priority(generation) if config.pipeline.mps else generation,
                lora=served_adapter(generation, config.training.tuning)
                if model_dir is None
                else None,
                kv_cache_bytes=require_plan(plan).vllm_kv_cache_bytes,
                log=engine_log(config, f"vllm{suffix}"),
                num_candidates=config.objective.student_candidates,
                make_host=make_host,
            )


def with_low_gpu_priority(generation: VllmGeneration) -> VllmGeneration:
    """Copy the section with a low GPU priority, unless its environment sets one.

    Scoring and training then go first. Rollouts run less far ahead of the learner, and a decode
    step serves more of them (measured in docs/measured/overlap.md).
    """
    environment = {PRIORITY_VARIABLE: BELOW_NORMAL} | generation.environment
    return generation.model_copy(update={"environment": environment})


def served_adapter(generation: GenerationConfig, tuning: TuningConfig) -> LoraTuning | None:
    """The tuning whose adapters are pushed alone; None where whole weights are pushed."""
    swaps = isinstance(generation, VllmGeneration) and generation.adapters == "swap"
    return tuning if swaps and isinstance(tuning, LoraTuning) else None


@asynccontextmanager
async def static_engine(config: RunConfig, model_dir: str) -> AsyncIterator[StreamingRolloutEngine]:
    """Start an engine that serves the weights in a directory as step 0."""
    scratch = channel_folder(config.generation)
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


@asynccontextmanager
async def static_samplers(
    config: RunConfig,
) -> AsyncIterator[tuple[Sampler | None, Sampler | None]]:
    """Start what samples rollouts without training: the student's engine, the teacher, or both."""
    samplers = config.rollouts.samplers
    async with AsyncExitStack() as stack:
        student, teacher = None, None
        if "teacher" in samplers:
            scorer = build_teacher(config, plan_memory(config))
            stack.push_async_callback(scorer.close)
            await scorer.start()
            teacher = build_teacher_rollouts(config, scorer)
            assert teacher is not None, "the config names the teacher"
            stack.push_async_callback(teacher.close)
            await teacher.start()
        if "student" in samplers:
            student = await stack.enter_async_context(static_engine(config, config.student.model))
        yield student, teacher


def build_learner(
    config: RunConfig,
    teacher: TeacherScorer | None,
    plan: MemoryPlan | None,
    cluster: RunCluster | None = None,
) -> ReplayingLearner:
    """Build the learner, with the teacher's output head where the objective needs it.

    Args:
        cluster: where the ranks of ``cluster.learner`` run.

    Raises:
        ConfigError: the config has such ranks, and there is no cluster for them.
    """
    training = config.training
    if config.cluster is not None and config.cluster.learner is not None:
        return require_cluster(cluster, "learner").learner(
            lambda make_host, suffix: _hosted_learner(config, plan, make_host, suffix)
        )
    if isinstance(training, EmbeddedTraining) and not training.own_process:
        needs_head = isinstance(config.objective.score_request, HiddenRequest)
        return build_embedded_learner(
            _learner_settings(config, training),
            teacher_head_VD=output_head(teacher) if needs_head else None,
        )
    return _hosted_learner(config, plan)


def _hosted_learner(
    config: RunConfig,
    plan: MemoryPlan | None,
    make_host: MakeHost = LocalProcess,
    suffix: str = "",
) -> HostedLearner:
    """Build a learner, or a rank of one, in a process of its own."""
    training = config.training
    match training:
        case EmbeddedTraining():
            settings = _learner_settings(config, training)
            log = engine_log(config, f"learner{suffix}")
            return hosted_embedded_learner(settings, log=log, make_host=make_host)
        case UnslothTraining():
            memory_bytes = require_plan(plan).learner_memory_bytes
            settings = _learner_settings(config, training, memory_bytes)
            log = engine_log(config, f"unsloth{suffix}")
            return unsloth_learner(settings, log=log, make_host=make_host)


def _learner_settings(
    config: RunConfig, training: Training, memory_bytes: int | None = None
) -> LearnerSettings[Training]:
    return LearnerSettings(
        model_dir=Path(config.student.model),
        training=training,
        objective=config.objective,
        replay=config.replay,
        total_steps=config.steps,
        seed=config.seed,
        publish_adapter=served_adapter(config.generation, training.tuning) is not None,
        memory_bytes=memory_bytes,
    )


def engine_interpreters(config: RunConfig) -> dict[str, EngineInterpreter]:
    """List the engines that have an interpreter of their own on this machine, by kind.

    A teacher's in another interpreter has its setting in the name: ``vllm:scoring``,
    ``vllm:scoring.teachers.math``.
    """
    found: dict[str, EngineInterpreter] = {}
    sections = {
        "generation": config.generation,
        **{teacher.setting: teacher.section for teacher in config.loaded_teachers},
        "training": config.training,
    }
    for name, section in sections.items():
        if section.kind == "embedded":
            continue
        if isinstance(section, SglangScoring | VllmScoring) and section.urls:
            continue
        python = engine_python(section.kind, name, section.python)
        same = found.get(section.kind)
        kind = section.kind if same is None or same.python == python else f"{section.kind}:{name}"
        found.setdefault(kind, EngineInterpreter(python, section.environment))
    return found
