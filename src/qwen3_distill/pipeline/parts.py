"""The parts of a run, and what they do together."""

import asyncio
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen3_distill.config import (
    RunConfig,
    SampledReverseKL,
    SglangScoring,
)
from qwen3_distill.data.prompts import PromptStream
from qwen3_distill.modeling.loading import load_tokenizer
from qwen3_distill.pipeline.requests import make_batch
from qwen3_distill.ports import (
    ReplayingLearner,
    StreamingRolloutEngine,
    TeacherScorer,
    WeightChannel,
)
from qwen3_distill.types import Batch, Rollout, ScoredRollout
from qwen3_distill.utils.concurrency import together


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
        if isinstance(config.scoring, SglangScoring):
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
    objective = config.objective
    return objective.task_reward_weight if isinstance(objective, SampledReverseKL) else 0.0
