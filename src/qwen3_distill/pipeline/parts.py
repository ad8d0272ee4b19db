"""The parts of a run, and how they start and end together."""

import asyncio
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen3_distill.config import RunConfig
from qwen3_distill.data.prompts import PromptStream
from qwen3_distill.modeling.loading import load_tokenizer
from qwen3_distill.pipeline.assembly.fleet import RunCluster
from qwen3_distill.pipeline.requests import make_batch
from qwen3_distill.pipeline.starting import start_engines
from qwen3_distill.pipeline.verification import BackgroundVerifier
from qwen3_distill.ports import (
    FollowingTeacher,
    ReplayingLearner,
    Sampler,
    StartsInTwo,
    StreamingRolloutEngine,
    TeacherScorer,
    WeightChannel,
)
from qwen3_distill.scoring.by_tag import TagSampler
from qwen3_distill.scoring.context import ContextComparison
from qwen3_distill.scoring.views import TeacherView
from qwen3_distill.types import Batch, Rollout, TrainingRollout


@dataclass(frozen=True)
class TextTools:
    """Decodes token ids for verifiers and people. Text is never encoded again."""

    student_dir: str

    @cached_property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        return load_tokenizer(self.student_dir, weights=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode all tokens, without special ones."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def decode_each(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Decode each token by itself; special tokens by their names."""
        return tuple(self.tokenizer.decode([token_id]) for token_id in token_ids)


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """Counts of the prompts that a run trains on and is evaluated on."""

    counts: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict)
    """By setting (``prompts``, ``evaluation.prompts``): prompts used (null: endless), dropped."""
    notes: tuple[str, ...] = ()
    """Facts that the user is told before the run, one sentence each."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that a pipeline connects."""

    config: RunConfig
    prompts: PromptStream
    engine: StreamingRolloutEngine
    teacher: TeacherScorer | None
    """None: training needs no teacher, for scores or for samples."""
    view: TeacherView
    """Turns a rollout into a scoring job, and the teacher's answer into its score."""
    learner: ReplayingLearner
    channel: WeightChannel
    text: TextTools
    verifier: BackgroundVerifier | None
    """Gives training rollouts their rewards; None: the config has no verifier."""
    teacher_sampler: Callable[[], AbstractAsyncContextManager[Sampler]]
    """Opens a sampler that answers as the teacher, for an evaluation."""
    samples_elsewhere: bool
    """Whether the rollout engine has a process of its own."""
    loads_beside_steps: bool
    """Whether the rollout engine may load a version while the learner takes a step."""
    teacher_rollouts: TagSampler | None = None
    """Samples the teacher's answers to train on; None: the teacher gives none."""
    data: DataRecord = field(default_factory=DataRecord)
    scratch: Path | None = None
    """Folder of the weight channel's files, removed at the end."""
    cluster: RunCluster | None = None
    """Where engines run that are not on this machine's own processes; ended after them."""
    following: FollowingTeacher | None = None
    """The teacher, if its weights follow the student's."""
    comparison: ContextComparison | None = None
    """Compares the teacher with and without its context; None: it has none."""

    @property
    def scorer(self) -> TeacherScorer | None:
        """The teacher, if the objective needs its scores."""
        return None if self.config.objective.score_request is None else self.teacher

    @property
    def required_teacher(self) -> TeacherScorer:
        """The teacher of a run that has one."""
        assert self.teacher is not None, "training needs no teacher"
        return self.teacher

    def compares_context(self, step: int) -> bool:
        """Whether to measure what the teacher's context tells it, after ``step`` finished steps."""
        return (
            self.scorer is not None
            and self.comparison is not None
            and (self.comparison.is_due(step))
        )

    @property
    def counters(self) -> dict[str, float]:
        """Counts of engine, teacher and a group's ranks since the start, by metric key."""
        teacher = {} if self.teacher is None else self.teacher.counters
        ranks = {} if self.cluster is None else self.cluster.counters
        return {**self.engine.counters, **teacher, **ranks}

    def begin_checks(self, rollouts: Sequence[Rollout]) -> None:
        """Let the verifier check rollouts while other work goes on; without one, do nothing."""
        if self.verifier is not None:
            self.verifier.begin(rollouts)

    def forget_checks(self) -> None:
        """Drop the verifier's rewards of a step that is over."""
        if self.verifier is not None:
            self.verifier.forget()

    def make_batch(self, scored: Sequence[TrainingRollout]) -> Batch:
        """Build a step's batch, with the config's task reward."""
        objective = self.config.objective
        return make_batch(
            scored,
            task_reward_weight=objective.reward_weight,
            is_correct=None if self.verifier is None else self.verifier.reward,
            scale=objective.group_scale,
        )

    async def start(self, say: Callable[[str], None] = lambda message: None) -> None:
        """Start the engines concurrently, once a teacher whose share is of the free memory has it.

        What takes no memory of the device (`StartsInTwo`) starts with that teacher.

        Raises:
            EngineStartError: one does not start; the starts of the others were cancelled.
        """
        config = self.config
        if self.cluster is not None:
            await self.cluster.start(say)
        starts = {
            f"the rollout engine ({config.generation.kind})": self.engine.start,
            f"the learner ({config.training.kind})": self.learner.start,
        }
        if self.teacher is not None:
            kind = "" if config.scoring is None else f" ({config.scoring.kind})"
            teacher = {f"the teacher{kind}": self.teacher.start}
            if self.teacher.starts_first:
                if isinstance(self.engine, StartsInTwo):
                    worker = f"the rollout engine's process ({config.generation.kind})"
                    teacher[worker] = self.engine.prepare
                await start_engines(teacher, say, then=starts, after=self.teacher.memory_taken)
            else:
                await start_engines(teacher | starts, say)
        else:
            await start_engines(starts, say)
        if self.teacher_rollouts is not None:
            await start_engines({"sampling from the teacher": self.teacher_rollouts.start}, say)

    async def close(self) -> None:
        """Close every engine, also when one of them fails to close."""
        maybe = (self.teacher_rollouts, self.engine, self.teacher, self.learner)
        parts = [part for part in maybe if part is not None]
        if self.verifier is not None:
            self.verifier.close()
        results = await asyncio.gather(*(part.close() for part in parts), return_exceptions=True)
        if self.cluster is not None:
            await self.cluster.close()
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
