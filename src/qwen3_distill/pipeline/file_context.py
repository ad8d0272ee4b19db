"""Gives rollouts of a file the teacher's context of the config that uses them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qwen3_distill.config import RunConfig
from qwen3_distill.data.prompts import PromptStream
from qwen3_distill.errors import DataError
from qwen3_distill.pipeline.assembly.data import build_training_stream
from qwen3_distill.pipeline.assembly.views import has_context
from qwen3_distill.pipeline.parts import TextTools
from qwen3_distill.ports import TeacherScorer
from qwen3_distill.scoring.by_tag import teacher_id_for
from qwen3_distill.types import Prompt, Rollout, ScoredRollout, TrainingRollout


def in_own_context(
    rollouts: Sequence[Rollout], file: Path, open_prompts: Callable[[], PromptStream], *, has: bool
) -> list[Rollout]:
    """Return rollouts with what the config's teacher reads, whatever their file says of another.

    Args:
        open_prompts: opens the config's prompts, of which every rollout has one.
        has: whether the config's teacher has a context; without one, none is kept.

    Raises:
        DataError: a rollout's prompt is not among the config's prompts, or has other tokens there.
    """
    if not has:
        return [_seen(rollout, None) for rollout in rollouts]
    stream = open_prompts()
    prompts = stream.find({rollout.prompt.prompt_id for rollout in rollouts})
    found: list[Rollout] = []
    for rollout in rollouts:
        prompt = prompts.get(rollout.prompt.prompt_id)
        what = f"{file}: the prompt {rollout.prompt.prompt_id} of rollout {rollout.rollout_id}"
        if prompt is None:
            raise DataError(
                f"{what} is not among the config's prompts, so that scoring.context has no row to "
                "render; set prompts to the file that it was sampled from"
            )
        before = rollout.continues_at
        if before:
            prompt = prompt.followed_by(rollout.prompt.token_ids[-before:])
        if prompt.token_ids.tolist() != rollout.prompt.token_ids.tolist():
            raise DataError(
                f"{what} has other tokens than the config renders, so that scoring.context may be "
                "of another row; set prompts and student.template_arguments as they were when it "
                "was sampled"
            )
        found.append(_seen(rollout, prompt))
    return found


def _seen(rollout: Rollout, prompt: Prompt | None) -> Rollout:
    teacher_ids = None if prompt is None else prompt.teacher_ids
    return replace(rollout, prompt=replace(rollout.prompt, teacher_ids=teacher_ids))


def reads_alike(one: Rollout, other: Rollout) -> bool:
    """Whether the teacher reads the same tokens before two copies of a rollout."""
    ids = [r.prompt.teacher_ids for r in (one, other)]
    first, second = (None if each is None else each.tolist() for each in ids)
    return first == second


def items_in_own_context(
    items: Sequence[TrainingRollout],
    file: Path,
    open_prompts: Callable[[], PromptStream],
    *,
    has: bool,
) -> list[TrainingRollout]:
    """`in_own_context` of scored rollouts; those whose teacher read other tokens lose their score.

    Raises:
        DataError: as `in_own_context`.
    """
    rollouts = in_own_context([item.rollout for item in items], file, open_prompts, has=has)
    return [
        item if reads_alike(item.rollout, rollout) else TrainingRollout(rollout=rollout)
        for item, rollout in zip(items, rollouts, strict=True)
    ]


def check_scored_by(
    teacher: TeacherScorer,
    rows: Sequence[tuple[int, TrainingRollout]],
    scored: Path,
    config: RunConfig,
    text: TextTools,
) -> None:
    """Check that the config's teacher scored a file's rollouts, behind the config's context.

    Raises:
        DataError: another teacher did, or it read something else.
    """
    items = [item for _, item in rows if isinstance(item, ScoredRollout)]
    for item in items:
        expected = teacher_id_for(teacher, item.rollout)
        if item.score.teacher_id != expected:
            found = f"{item.score.teacher_id} ({item.rollout.rollout_id})"
            raise DataError(
                f"{scored} was scored by {found}, but the config's teacher is {expected}"
            )
    has = has_context(config)
    rollouts = [item.rollout for item in items]
    own = in_own_context(rollouts, scored, lambda: build_training_stream(config, text), has=has)
    for rollout, told in zip(rollouts, own, strict=True):
        if not reads_alike(rollout, told):
            raise DataError(
                f"{scored}: the teacher of rollout {rollout.rollout_id} read another context than "
                "scoring.context renders; score the rollouts again with this config"
            )
