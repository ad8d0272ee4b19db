"""Several teachers behind one port: every job goes to the teacher of its tag.

The tag comes with the prompt (`data.tags`), the view writes it into the job, and whatever lies
between, every score must carry the id of that tag's teacher: `TeachersByTag.score` compares them.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from qwen3_distill.data.tags import group_by_tag, tag_of
from qwen3_distill.errors import DataError, EngineError
from qwen3_distill.ports import Sampler, TeacherScorer
from qwen3_distill.scoring.members import TeacherGroup, closed_together, merged
from qwen3_distill.scoring.views import TeacherView
from qwen3_distill.types import (
    AlignedRollout,
    ModelIdentity,
    Prompt,
    Rollout,
    RolloutRequest,
    ScoredRollout,
    ScoreFailure,
    ScoreResult,
    ScoringJob,
    UnalignedRollout,
)
from qwen3_distill.utils.concurrency import together


class ViewByTag(TeacherView):
    """A `TeacherView` that looks at a rollout as its tag's teacher does, and names the tag.

    Args:
        views: by tag.
    """

    def __init__(self, views: Mapping[str, TeacherView]) -> None:
        self._views = dict(views)

    def check(self, student: ModelIdentity, teacher: ModelIdentity) -> None:
        """Raise unless the teacher can score the student's tokens in every view."""
        for view in self._views.values():
            view.check(student, teacher)

    def job(self, rollout: Rollout) -> ScoringJob | UnalignedRollout:
        """Return the tokens for the teacher of the rollout's tag.

        Raises:
            DataError: the rollout's prompt has no tag, or one without a teacher.
        """
        tag = required_tag(rollout.prompt, self._views, f"rollout {rollout.rollout_id}")
        job = self._views[tag].job(rollout)
        return job if isinstance(job, UnalignedRollout) else replace(job, tag=tag)

    def scored(
        self, rollout: Rollout, result: ScoreResult
    ) -> ScoredRollout | AlignedRollout | ScoreFailure:
        """Return the rollout with its score, or the failure unchanged."""
        tag = required_tag(rollout.prompt, self._views, f"rollout {rollout.rollout_id}")
        return self._views[tag].scored(rollout, result)


class TeachersByTag(TeacherGroup):
    """A `TeacherScorer` over a teacher for every tag, each of another model or kind.

    Args:
        teachers: by tag, at least one.
    """

    def __init__(self, teachers: Mapping[str, TeacherScorer]) -> None:
        super().__init__(tuple(teachers.values()))
        self.teachers = dict(teachers)

    @property
    def ids(self) -> Mapping[str, str]:
        """Every teacher's id, by tag."""
        return {tag: teacher.teacher_id for tag, teacher in self.teachers.items()}

    @property
    def teacher_id(self) -> str:
        """All ids with their tags. No score carries it: a score names its own teacher."""
        return " ".join(f"{tag}={name}" for tag, name in sorted(self.ids.items()))

    @property
    def counters(self) -> Mapping[str, float]:
        """Sums over the teachers, and every teacher's own as ``by_tag/{tag}_...``."""
        return merged({f"by_tag/{tag}": one.counters for tag, one in self.teachers.items()})

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        """See `TeacherScorer.score`.

        Raises:
            DataError: a job has no tag, or one without a teacher.
            EngineError: a score is not of its job's teacher.
        """
        groups = group_by_tag([self._tag(job) for job in jobs])
        answers = await together(
            *(
                self.teachers[tag].score([jobs[index] for index in indices])
                for tag, indices in groups.items()
            )
        )
        results: dict[int, ScoreResult] = {}
        for indices, found in zip(groups.values(), answers, strict=True):
            results.update(zip(indices, found, strict=True))
        ordered = [results[index] for index in range(len(jobs))]
        for job, result in zip(jobs, ordered, strict=True):
            self._require_own_teacher(job, result)
        return ordered

    def _require_own_teacher(self, job: ScoringJob, result: ScoreResult) -> None:
        """Refuse a score that another teacher gave than the one of the job's tag."""
        expected = self.teachers[self._tag(job)].teacher_id
        if not isinstance(result, ScoreFailure) and result.teacher_id != expected:
            raise EngineError(
                f"rollout {job.rollout_id} has the tag {job.tag!r}, whose teacher is {expected}, "
                f"and was scored by {result.teacher_id}; this is an error of the program or of a "
                "server, and no setting changes it"
            )

    def _tag(self, job: ScoringJob) -> str:
        if job.tag is None or job.tag not in self.teachers:
            raise DataError(_unknown(f"scoring job of {job.rollout_id}", job.tag, self.teachers))
        return job.tag


def teacher_id_for(teacher: TeacherScorer, rollout: Rollout) -> str:
    """Return the id that a rollout's score must carry: that of its tag's teacher, if several.

    Raises:
        DataError: the rollout has no tag, or one without a teacher.
    """
    # By attribute: what counts the teacher's work stands in front of it.
    ids: Mapping[str, str] | None = getattr(teacher, "ids", None)
    if ids is None:
        return teacher.teacher_id
    return ids[required_tag(rollout.prompt, ids, f"rollout {rollout.rollout_id}")]


def required_tag(prompt: Prompt, known: Mapping[str, object], what: str) -> str:
    """Return a prompt's tag.

    Args:
        known: by tag, whatever there is for it.
        what: the prompt or rollout, for the error.

    Raises:
        DataError: there is no tag, or one that is not known.
    """
    tag = tag_of(prompt)
    if tag is None or tag not in known:
        raise DataError(_unknown(f"{what} (prompt {prompt.prompt_id})", tag, known))
    return tag


def _unknown(what: str, tag: str | None, known: Mapping[str, object]) -> str:
    found = "no tag" if tag is None else f"the tag {tag!r}, which has no teacher"
    return (
        f"{what} has {found}, expected one of {', '.join(known)}; sample it with this config, "
        "whose scoring.by names the field of a row that holds the tag"
    )


class TagSampler(Protocol):
    """A `Sampler` that is started and closed."""

    async def start(self) -> None: ...

    def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]: ...

    async def close(self) -> None: ...


class SamplerByTag:
    """A `Sampler` that lets every prompt's own teacher answer.

    Args:
        samplers: by tag.
    """

    def __init__(self, samplers: Mapping[str, Sampler]) -> None:
        self._samplers = dict(samplers)

    async def generate(self, requests: Sequence[RolloutRequest]) -> AsyncIterator[Rollout]:
        """Let every tag's sampler answer its requests, all at once.

        Raises:
            DataError: a prompt has no tag, or one without a teacher.
        """
        tags = [
            required_tag(request.prompt, self._samplers, f"request {request.rollout_id}")
            for request in requests
        ]
        events: asyncio.Queue[Rollout | Exception | None] = asyncio.Queue()
        groups = group_by_tag(tags)
        asking = [
            asyncio.ensure_future(self._pass_on(tag, [requests[i] for i in indices], events))
            for tag, indices in groups.items()
        ]
        num_open = len(asking)
        try:
            while num_open:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    num_open -= 1
                else:
                    yield event
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def _pass_on(
        self,
        tag: str,
        requests: Sequence[RolloutRequest],
        events: "asyncio.Queue[Rollout | Exception | None]",
    ) -> None:
        """Put a sampler's rollouts into ``events``, then None, or the error that ended it."""
        try:
            async for rollout in self._samplers[tag].generate(requests):
                events.put_nowait(rollout)
        except Exception as error:  # noqa: BLE001 - handed to the consumer
            events.put_nowait(error)
        else:
            events.put_nowait(None)


class TeacherSamplersByTag(SamplerByTag):
    """A `SamplerByTag` whose samplers are started and closed together."""

    def __init__(self, samplers: Mapping[str, TagSampler]) -> None:
        super().__init__(samplers)
        self._parts = tuple(samplers.values())

    async def start(self) -> None:
        for part in self._parts:
            await part.start()

    async def close(self) -> None:
        await closed_together(self._parts)
