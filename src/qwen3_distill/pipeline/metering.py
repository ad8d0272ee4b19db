"""Counts what the engines of a run do, for the cost ledger, by standing in front of their ports.

The loops and the evaluator call the engines as before; what they sample, score, train and publish
is added to the ledger when the call returns it.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, cast

from qwen3_distill.config import ObjectiveConfig, TuningConfig
from qwen3_distill.data.tags import tag_of
from qwen3_distill.modeling.flops import (
    TrainedTokens,
    causal_pairs,
    forward_flops,
    objective_flops,
    sampling_flops,
    training_flops,
)
from qwen3_distill.modeling.shapes import ModelShape
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.ports import CACHED_TOKENS, STORED_TOKENS, Sampler, WeightChannel
from qwen3_distill.recording.cost_ledger import CostLedger
from qwen3_distill.types import (
    Batch,
    HiddenScore,
    Rollout,
    RolloutRequest,
    ScoreFailure,
    ScoreResult,
    ScoringJob,
    TopKScore,
    Update,
    WeightVersion,
)

Who: TypeAlias = Literal["student", "teacher"]


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Shapes and settings from which the amounts of a run are computed."""

    student: ModelShape | None
    """None where its shape cannot be read: its FLOPs are then not counted."""
    teachers: Mapping[str | None, tuple[ModelShape, ...] | None]
    """By tag, the teacher's shape, of an ensemble every member's; under None where there are no
    tags. None where one cannot be read."""
    tuning: TuningConfig
    objective: ObjectiveConfig
    published_bytes: int
    """Bytes of a weight version, as it is published."""
    unknown: Mapping[str, str]
    """By model without a shape: why."""

    @property
    def teacher(self) -> ModelShape | None:
        """The one teacher's shape; None with several."""
        shapes = self.teachers.get(None)
        return shapes[0] if shapes is not None and len(shapes) == 1 else None


class Meter:
    """Adds what engines did to the ledger."""

    def __init__(self, model: CostModel, ledger: CostLedger) -> None:
        self._model, self.ledger = model, ledger
        self._counted: dict[str, float] = {}
        """The teacher's counters, as far as they are in the ledger."""

    def sampled(self, rollout: Rollout, who: Who, *, prefills: bool, evaluates: bool) -> None:
        """Add a rollout that has ended.

        Args:
            prefills: whether its prompt was computed for it, not for an earlier sample.
        """
        prompt, response = int(rollout.prompt.token_ids.size), rollout.num_tokens
        tag = tag_of(rollout.prompt) if None not in self._model.teachers else None
        shapes = self._model.teachers.get(tag) or ()
        shape = self._model.student if who == "student" else next(iter(shapes), None)
        amounts = {f"tokens/sampled_{who}": rollout.num_loss_tokens}
        if prefills:
            amounts[f"tokens/prompt_{who}"] = prompt
        if shape is not None:
            amounts[f"flops/sample_{who}"] = sampling_flops(
                shape, prompt=prompt, response=response, prefills=prefills
            )
        if tag is not None and not evaluates:
            amounts[f"by_tag/{tag}_sampled_tokens"] = rollout.num_loss_tokens
        self.ledger.add(
            amounts, evaluates=evaluates, rollout_id="" if evaluates else rollout.rollout_id
        )

    def scored(
        self,
        jobs: Sequence[ScoringJob],
        results: Sequence[ScoreResult],
        counters: Mapping[str, float],
    ) -> None:
        """Add the scores of one call; the teacher's counters tell what it did not compute."""
        for job, result in zip(jobs, results, strict=True):
            self.ledger.add(self._scored(job, result), rollout_id=job.rollout_id)
        cached, stored = self._new(counters, CACHED_TOKENS), self._new(counters, STORED_TOKENS)
        saved: dict[str, float] = {"tokens/score_cached": cached, "tokens/score_stored": stored}
        if cached + stored:
            saved["flops/score"] = -self._saved_flops(jobs, cached, stored)
        self.ledger.add({key: value for key, value in saved.items() if value})

    def _saved_flops(self, jobs: Sequence[ScoringJob], cached: int, stored: int) -> int:
        """Estimate what was not computed; with several teachers in proportion to their jobs."""
        tokens = sum(int(job.token_ids.size) for job in jobs)
        saved = sum(self._score_flops(job) for job in jobs) * stored // max(tokens, stored)
        by_tag = Counter[str | None]()
        for job in jobs:
            by_tag[job.tag] += int(job.token_ids.size)
        for tag, its_tokens in by_tag.items():
            for shape in self._model.teachers.get(tag) or ():
                part = cached * its_tokens // max(tokens, 1)
                saved += forward_flops(shape, tokens=part, pairs=0, head_tokens=0)
        return saved

    def trained(self, update: Update) -> None:
        """Add an optimizer step, by the learner's own counts of it."""
        counts = {metric.key: int(metric.value) for metric in update.metrics if _is_count(metric)}
        model = self._model
        work = TrainedTokens(
            tokens=counts["train/input_tokens"],
            pairs=counts["train/attention_pairs"],
            loss_tokens=counts["train/head_tokens"],
            recomputed_loss_tokens=counts["train/recomputed_head_tokens"],
            recomputed_layers=counts["train/recomputed_layers"],
        )
        padding = replace(
            work,
            tokens=counts["train/padding_tokens"],
            pairs=counts["train/padding_pairs"],
            loss_tokens=0,
            recomputed_loss_tokens=0,
        )
        amounts = {
            "tokens/trained": work.tokens,
            "tokens/loss": work.loss_tokens,
            "tokens/padding": padding.tokens,
        }
        if model.student is not None:
            amounts["flops/train"] = training_flops(model.student, model.tuning, work)
            amounts["flops/train"] += objective_flops(
                model.student, model.teacher, model.objective, work
            )
            amounts["flops/padding"] = training_flops(model.student, model.tuning, padding)
        self.ledger.add(amounts)

    def published(self) -> None:
        """Add a weight version that was put into the channel."""
        self.ledger.add({"bytes/weights": self._model.published_bytes})

    def _scored(self, job: ScoringJob, result: ScoreResult) -> dict[str, int]:
        tokens = int(job.token_ids.size)
        amounts = {"tokens/scored": tokens, "tokens/scored_response": job.num_scored}
        if self._model.teachers.get(job.tag):
            amounts["flops/score"] = self._score_flops(job)
        if job.tag is not None:
            amounts[f"by_tag/{job.tag}_scored_tokens"] = tokens
        if isinstance(result, ScoreFailure):
            return amounts
        amounts["bytes/scores"] = result.logprobs.nbytes
        if isinstance(result, TopKScore):
            amounts["bytes/top_k"] = result.candidate_ids.nbytes + result.candidate_logprobs.nbytes
        if isinstance(result, HiddenScore):
            amounts["bytes/hidden_states"] = result.hidden.nbytes
        return amounts

    def _score_flops(self, job: ScoringJob) -> int:
        """Count the pass of the job's teacher over it, of an ensemble every member's."""
        tokens = int(job.token_ids.size)
        return sum(
            forward_flops(
                shape, tokens=tokens, pairs=causal_pairs(tokens), head_tokens=job.num_scored
            )
            for shape in self._model.teachers.get(job.tag) or ()
        )

    def _new(self, counters: Mapping[str, float], key: str) -> int:
        """Return by how much a counter has grown since it was last read."""
        now, before = counters.get(key, 0.0), self._counted.get(key, 0.0)
        self._counted[key] = now
        return int(now - before if now >= before else now)  # it began anew with its engine


_COUNTS = (
    *("train/input_tokens", "train/padding_tokens", "train/attention_pairs"),
    *("train/padding_pairs", "train/head_tokens", "train/recomputed_head_tokens"),
    "train/recomputed_layers",
)


def _is_count(metric: Any) -> bool:
    return metric.key in _COUNTS


def metered(parts: Parts, meter: Meter) -> Parts:
    """Copy the parts with everything that the loop does counted as training."""
    engine: Any = MeteredEngine(parts.engine, meter, "student", evaluates=False)
    teacher: Any = None if parts.teacher is None else MeteredTeacher(parts.teacher, meter)
    learner: Any = MeteredLearner(parts.learner, meter)
    answers: Any = None
    if parts.teacher_rollouts is not None:
        answers = MeteredEngine(parts.teacher_rollouts, meter, "teacher", evaluates=False)
    return replace(parts, engine=engine, teacher=teacher, learner=learner, teacher_rollouts=answers)


def metered_evaluation(parts: Parts, meter: Meter) -> Parts:
    """Copy the parts with everything that they sample counted as evaluation."""
    engine: Any = MeteredEngine(parts.engine, meter, "student", evaluates=True)
    sampler = _opened(parts.teacher_sampler, meter, evaluates=True)
    return replace(parts, engine=engine, teacher_sampler=sampler)


class _Metered:
    """Passes everything on that it does not count."""

    def __init__(self, part: Any, meter: Meter) -> None:
        self._part, self._meter = part, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


class MeteredEngine(_Metered):
    """A `Sampler`, or a whole rollout engine, of which the rollouts are counted.

    Samples of one prompt in one call share the prompt's pass, as every engine here does it.
    """

    def __init__(self, part: Any, meter: Meter, who: Who, *, evaluates: bool) -> None:
        super().__init__(part, meter)
        self._who: Who = who
        self._evaluates = evaluates

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        prefilled: set[str] = set()
        async for rollout in self._part.generate(requests):
            prompt_id = rollout.prompt.prompt_id
            self._meter.sampled(
                rollout,
                self._who,
                prefills=prompt_id not in prefilled,
                evaluates=self._evaluates,
            )
            prefilled.add(prompt_id)
            yield rollout


class MeteredTeacher(_Metered):
    """A `TeacherScorer` of which the scores are counted."""

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        results: list[ScoreResult] = await self._part.score(jobs)
        self._meter.scored(jobs, results, self._part.counters)
        return results


class MeteredLearner(_Metered):
    """A learner of which the steps and the published weights are counted."""

    async def update(self, batch: Batch) -> Update:
        return self._counted(await self._part.update(batch))

    async def update_replayed(self, num_rollouts: int) -> Update:
        return self._counted(await self._part.update_replayed(num_rollouts))

    async def publish(self, channel: WeightChannel) -> WeightVersion:
        version: WeightVersion = await self._part.publish(channel)
        self._meter.published()
        return version

    def _counted(self, update: Update) -> Update:
        self._meter.trained(update)
        return update


SamplerOpener: TypeAlias = Callable[[], AbstractAsyncContextManager[Sampler]]


def _opened(opener: SamplerOpener, meter: Meter, *, evaluates: bool) -> SamplerOpener:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Sampler]:
        async with opener() as sampler:
            counted: Any = MeteredEngine(sampler, meter, "teacher", evaluates=evaluates)
            yield cast(Sampler, counted)

    return opened
