"""From a config to the parts of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from qwen3_distill.config import (
    EvaluationConfig,
    RunConfig,
    SampledReverseKL,
    SamplingConfig,
    VerifierConfig,
)
from qwen3_distill.data.prompts import PromptStream
from qwen3_distill.data.sources import PromptSource, build_source
from qwen3_distill.data.verifiers import build_verifier
from qwen3_distill.generation.embedded import EmbeddedRolloutEngine
from qwen3_distill.modeling.loading import load_identity, load_tokenizer, resolve_dtype
from qwen3_distill.pipeline.requests import make_batch
from qwen3_distill.protocols import Learner, RolloutEngine, TeacherScorer, WeightChannel
from qwen3_distill.scoring.embedded import EmbeddedTeacher
from qwen3_distill.scoring.request import HiddenRequest, request_for
from qwen3_distill.training.embedded import EmbeddedLearner
from qwen3_distill.training.objectives import build_objective
from qwen3_distill.types import Batch, Prompt, Rollout, ScoredRollout
from qwen3_distill.weights.directory import publish_directory
from qwen3_distill.weights.memory import MemoryChannel


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
    engine: RolloutEngine
    teacher: TeacherScorer
    learner: Learner
    channel: WeightChannel
    text: TextTools
    is_correct: Callable[[Rollout], bool] | None
    """Checks training rollouts; None without a verifier."""

    def make_batch(self, scored: Sequence[ScoredRollout]) -> Batch:
        """A step's batch, with the config's task reward."""
        weight = task_reward_weight(self.config)
        return make_batch(scored, task_reward_weight=weight, is_correct=self.is_correct)

    async def close(self) -> None:
        for part in (self.engine, self.teacher, self.learner):
            await part.close()


def task_reward_weight(config: RunConfig) -> float:
    """Weight of the verifier's reward; 0 for objectives that have none."""
    objective = config.objective
    return objective.task_reward_weight if isinstance(objective, SampledReverseKL) else 0.0


def build_parts(config: RunConfig) -> Parts:
    """Open data and load the embedded engines' models; real engines wait for `Parts.start`."""
    text = TextTools(config.student.model)
    prompts = build_prompts(config, text)
    teacher = build_teacher(config)
    return Parts(
        config=config,
        prompts=prompts,
        engine=build_engine(config),
        teacher=teacher,
        learner=build_learner(config, teacher),
        channel=build_channel(config),
        text=text,
        is_correct=build_checker(config.verifier, text) if config.verifier else None,
    )


def build_prompts(config: RunConfig, text: TextTools) -> PromptStream:
    """The training prompts in their order, each checked to fit the student's context."""
    source = build_source(config.prompts)
    prompts = _stream(config, source, text, config.sampling, seed=config.seed)
    prompts.check()
    return prompts


def build_engine(config: RunConfig, model_dir: str | None = None) -> RolloutEngine:
    """The rollout engine, without weights: load a version before the first rollout."""
    generation = config.generation
    if generation.kind != "embedded":
        raise NotImplementedError(generation.kind)
    return EmbeddedRolloutEngine(
        model_dir or config.student.model,
        device=generation.device,
        dtype=generation.dtype,
        max_sequences=generation.max_sequences,
    )


async def build_static_engine(config: RunConfig, model_dir: str) -> RolloutEngine:
    """An engine that serves a directory's own weights as step 0."""
    channel = MemoryChannel()
    dtype = resolve_dtype(config.training.dtype)
    version = publish_directory(model_dir, channel, dtype=dtype)
    engine = build_engine(config, model_dir)
    await engine.load(version, channel)
    return engine


def build_teacher(config: RunConfig) -> EmbeddedTeacher:
    """The scorer, asked for what the objective needs."""
    scoring = config.scoring
    if scoring.kind != "embedded":
        raise NotImplementedError(scoring.kind)
    return EmbeddedTeacher(
        scoring.model,
        request=request_for(config.objective),
        device=scoring.device,
        dtype=scoring.dtype,
        batch_tokens=scoring.batch_tokens,
        chunk_tokens=scoring.chunk_tokens,
    )


def build_learner(config: RunConfig, teacher: EmbeddedTeacher) -> Learner:
    """The learner, with the teacher's output head where the objective needs one."""
    if config.training.kind != "embedded":
        raise NotImplementedError(config.training.kind)
    needs_head = isinstance(request_for(config.objective), HiddenRequest)
    head_VD: torch.Tensor | None = teacher.output_head if needs_head else None
    return EmbeddedLearner(
        config.student.model,
        config=config.training,
        objective=build_objective(
            config.objective,
            teacher_head_VD=head_VD,
            chunk_tokens=config.training.chunk_tokens,
        ),
        total_steps=config.steps,
        seed=config.seed,
    )


def build_channel(config: RunConfig) -> WeightChannel:
    """How weights travel between this run's learner and its engine."""
    return MemoryChannel()


def build_checker(verifier: VerifierConfig, text: TextTools) -> Callable[[Rollout], bool]:
    """A rollout's correctness, by its text."""
    check = build_verifier(verifier)

    def is_correct(rollout: Rollout) -> bool:
        return check.correct(rollout.prompt, text.decode(rollout.response_ids.tolist()))

    return is_correct


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
