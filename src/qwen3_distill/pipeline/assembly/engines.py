"""From a config to the parts of a run."""

import asyncio
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qwen3_distill.config import (
    EmbeddedGeneration,
    EmbeddedScoring,
    EmbeddedTraining,
    EvaluationConfig,
    LoraTuning,
    RunConfig,
    SamplingConfig,
    SglangScoring,
    UnslothTraining,
    VerifierConfig,
    VllmGeneration,
)
from qwen3_distill.data.prompts import PromptStream
from qwen3_distill.data.sources import PromptSource, build_source
from qwen3_distill.data.verifiers import build_verifier, check_references
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.generation.embedded.hosted import EmbeddedRolloutProcess
from qwen3_distill.generation.vllm.engine import VllmRolloutEngine
from qwen3_distill.hosts.mps import BELOW_NORMAL, PRIORITY_VARIABLE
from qwen3_distill.modeling.loading import load_identity, load_tokenizer, resolve_dtype
from qwen3_distill.pipeline.requests import make_batch
from qwen3_distill.planning.device import detect_memory
from qwen3_distill.planning.plan import MemoryPlan, make_plan
from qwen3_distill.ports import (
    ReplayingLearner,
    Sampler,
    StreamingRolloutEngine,
    TeacherScorer,
    WeightChannel,
)
from qwen3_distill.scoring.cache import CachedTeacher
from qwen3_distill.scoring.embedded.hosted import EmbeddedTeacherProcess
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.score_request import HiddenRequest, request_for
from qwen3_distill.scoring.sglang.teacher import SglangTeacher
from qwen3_distill.scoring.views import SameView, TeacherView
from qwen3_distill.training.embedded.hosted import hosted_embedded_learner
from qwen3_distill.training.embedded.student import build_embedded_learner
from qwen3_distill.training.settings import LearnerSettings, Training
from qwen3_distill.training.unsloth.learner import unsloth_learner
from qwen3_distill.types import Batch, Prompt, Rollout, ScoredRollout
from qwen3_distill.utils.concurrency import together
from qwen3_distill.weights.directory import DirectoryChannel, publish_directory
from qwen3_distill.weights.ipc import IpcChannel
from qwen3_distill.weights.memory import MemoryChannel

_WEIGHTS = "qwen3-distill-weights-"


@dataclass(frozen=True)
class TextTools:
    """Token ids to text, for verifiers and people. Text never becomes ids again."""

    student_dir: str

    @cached_property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        return load_tokenizer(self.student_dir)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, special tokens left out."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def decode_each(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Every token's own text, special tokens shown by name."""
        return tuple(self.tokenizer.decode([token_id]) for token_id in token_ids)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a pipeline connects."""

    config: RunConfig
    prompts: PromptStream
    engine: StreamingRolloutEngine
    teacher: TeacherScorer
    learner: ReplayingLearner
    channel: WeightChannel
    text: TextTools
    is_correct: Callable[[Rollout], bool] | None
    """Checks training rollouts; None without a verifier."""
    view: TeacherView = field(default_factory=SameView)
    """How the teacher looks at a rollout."""
    scratch: Path | None = None
    """Folder of the weight channel's files, removed at the end."""

    def make_batch(self, scored: Sequence[ScoredRollout]) -> Batch:
        """A step's batch, with the config's task reward."""
        weight = task_reward_weight(self.config)
        return make_batch(scored, task_reward_weight=weight, is_correct=self.is_correct)

    async def start(self, say: Callable[[str], None] = lambda message: None) -> None:
        """Start the engines: side by side, after a teacher that takes a share of what is free.

        Raises:
            EngineStartError: one does not start; none of the others is being started any more.
        """
        config = self.config
        teacher = f"the teacher ({config.scoring.kind})"
        others = f"rollout engine ({config.generation.kind}) and learner ({config.training.kind})"
        if self.teacher.starts_first:
            say(f"starting {teacher}")
            await self.teacher.start()
            say(f"starting {others}")
            await together(self.engine.start(), self.learner.start())
        else:
            say(f"starting {teacher}, {others}")
            await together(self.teacher.start(), self.engine.start(), self.learner.start())

    async def close(self) -> None:
        """End every engine, also when one of them fails to end."""
        parts = (self.engine, self.teacher, self.learner)
        results = await asyncio.gather(*(part.close() for part in parts), return_exceptions=True)
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result


def task_reward_weight(config: RunConfig) -> float:
    """Weight of the verifier's reward; 0 for objectives that have none."""
    return config.objective.reward_weight


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


def plan_memory(config: RunConfig) -> MemoryPlan | None:
    """What each real engine may take; None where all are embedded and share one allocator.

    Raises:
        ConfigError: it does not fit.
    """
    kinds = {config.generation.kind, config.scoring.kind, config.training.kind}
    return None if kinds == {"embedded"} else make_plan(config)


def build_prompts(config: RunConfig, text: TextTools) -> PromptStream:
    """The training prompts in their order, each checked to fit the student's context, and to have
    an answer that the verifier can use."""
    source = build_source(config.prompts)
    prompts = _stream(config, source, text, config.sampling, seed=config.seed)
    prompts.check()
    if config.verifier is not None:
        check_references(config.verifier, source)
    return prompts


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
                kv_cache_bytes=_needed(plan).vllm_kv_cache_bytes,
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


def _needed(plan: MemoryPlan | None) -> MemoryPlan:
    assert plan is not None, "real engines have a plan"
    return plan


def engine_log(config: RunConfig, name: str) -> Path:
    """Where an engine's process writes its output."""
    return config.output_path / "logs" / f"{name}.log"


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
                memory_fraction=_teacher_share(config, _needed(plan)),
                max_total_tokens=_needed(plan).sglang_max_total_tokens,
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


def build_learner(
    config: RunConfig, teacher: TeacherScorer, plan: MemoryPlan | None
) -> ReplayingLearner:
    """The learner, with the teacher's output head where the objective needs one."""
    training = config.training
    match training:
        case EmbeddedTraining(own_process=True):
            settings = _learner_settings(config, training)
            return hosted_embedded_learner(settings, log=engine_log(config, "learner"))
        case EmbeddedTraining():
            needs_head = isinstance(request_for(config.objective), HiddenRequest)
            return build_embedded_learner(
                _learner_settings(config, training),
                teacher_head_VD=_output_head(teacher) if needs_head else None,
            )
        case UnslothTraining():
            settings = _learner_settings(config, training, _needed(plan).learner_memory_bytes)
            return unsloth_learner(settings, log=engine_log(config, "unsloth"))


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
        publish_adapter=_served_adapter(config) is not None,
        memory_bytes=memory_bytes,
    )


def _output_head(teacher: TeacherScorer) -> torch.Tensor | None:
    return teacher.output_head if isinstance(teacher, EmbeddedTeacher) else None


def samples_elsewhere(config: RunConfig) -> bool:
    """Whether the rollout engine is in a process of its own."""
    generation = config.generation
    return not isinstance(generation, EmbeddedGeneration) or generation.own_process


def learns_elsewhere(config: RunConfig) -> bool:
    """Whether the learner is in a process of its own."""
    training = config.training
    return not isinstance(training, EmbeddedTraining) or training.own_process


def channel_folder(config: RunConfig) -> Path | None:
    """A new folder in memory for weights that go from process to process; None if none do."""
    return (
        Path(tempfile.mkdtemp(prefix=_WEIGHTS, dir=_memory()))
        if samples_elsewhere(config)
        else None
    )


def run_channel_folder(config: RunConfig) -> Path | None:
    """`channel_folder` of a run, which holds its run folder: what it left when it was killed goes.

    Two versions of a model may lie there, in memory.
    """
    if not samples_elsewhere(config):
        return None
    name = hashlib.sha256(str(config.output_path.resolve()).encode()).hexdigest()[:16]
    folder = _memory() / f"{_WEIGHTS}{name}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:  # another user's
        return channel_folder(config)
    return folder


def _memory() -> Path:
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def build_channel(config: RunConfig, folder: Path | None) -> WeightChannel:
    """How weights travel between this run's learner and its engine."""
    generation = config.generation
    if folder is None:
        return MemoryChannel()
    if generation.kind == "embedded":
        return DirectoryChannel(folder)
    # The handles of IPC are of the very weights that are trained. While a step is taken, an engine
    # that is started again could not get the version that it served.
    trained_beside = config.pipeline.kind == "streaming" and config.training.tuning.kind == "full"
    if generation.full_weights == "directory" or trained_beside:
        return DirectoryChannel(folder)
    return IpcChannel(folder, strict=generation.full_weights == "ipc")


def build_checker(verifier: VerifierConfig, text: TextTools) -> Callable[[Rollout], bool]:
    """A rollout's correctness, by its text."""
    check = build_verifier(verifier)

    def is_correct(rollout: Rollout) -> bool:
        return check.correct(rollout.prompt, text.decode(rollout.response_ids.tolist()))

    return is_correct


def check_problems(config: RunConfig, evaluation: EvaluationConfig, text: TextTools) -> None:
    """Held-out problems are met in the middle of a run, so they are checked before it.

    Raises:
        DataError: one does not fit the student's context, or has no usable reference answer.
    """
    source = build_source(evaluation.prompts)
    _stream(config, source, text, evaluation.sampling, seed=0).check()
    check_references(evaluation.verifier, source)


def build_problems(
    config: RunConfig, evaluation: EvaluationConfig, text: TextTools
) -> Callable[[int], list[Prompt]]:
    """The first ``n`` held-out problems, always the same ones."""
    source = build_source(evaluation.prompts)
    stream = _stream(config, source, text, evaluation.sampling, seed=0)
    available = source.num_prompts

    def problems(count: int) -> list[Prompt]:
        return stream.take(0, count if available is None else min(count, available))

    return problems


def _stream(
    config: RunConfig,
    source: PromptSource,
    text: TextTools,
    sampling: SamplingConfig,
    *,
    seed: int,
) -> PromptStream:
    return PromptStream(
        source,
        text.tokenizer,
        seed=seed,
        context_length=load_identity(config.student.model).context_length,
        max_new_tokens=sampling.max_new_tokens,
        template_arguments=config.student.template_arguments,
    )
