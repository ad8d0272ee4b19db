"""Builds the view by which the config's teacher reads rollouts."""

from collections.abc import Sequence

from qwen3_distill.config import RunConfig
from qwen3_distill.data.sources import PromptSource, TaskSource
from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.pipeline.assembly.data import teacher_context_length
from qwen3_distill.scoring.aligned_view import (
    AlignedView,
    own_tokenizer_view,
    special_tokens_of,
)
from qwen3_distill.scoring.by_tag import ViewByTag
from qwen3_distill.scoring.context import ContextView
from qwen3_distill.scoring.views import SameView, TeacherView
from qwen3_distill.types import Rollout

_SAMPLE = 64
"""Prompts that are rendered with the teacher's own template before a run."""


def build_view(config: RunConfig) -> TeacherView:
    """Build the view from the files of student and teacher, without their weights.

    Raises:
        HandshakeError: the teacher's own tokens cannot be aligned with the student's.
        ModelError: a file is missing or damaged.
    """
    if config.tags:  # a rule: several teachers read the student's own tokens
        return ViewByTag({tag: SameView() for tag in config.tags})
    if has_context(config):
        return ContextView()
    return build_own_view(config) or SameView()


def view_for_prompts(config: RunConfig, source: PromptSource) -> TeacherView:
    """Build the view of a run, and check that the teacher's own template renders its prompts.

    Raises:
        HandshakeError: see `build_view`.
        ModelError: see `build_view`.
        DataError: see `own_prompt_lengths`.
    """
    view = build_view(config)
    if isinstance(view, AlignedView):
        own_prompt_lengths(view, source)
    return view


def own_prompt_lengths(view: AlignedView, source: PromptSource) -> list[int]:
    """Render prompts with the teacher's own template; return their lengths in its tokens.

    It renders the first prompt of every sequence of roles, and some of the others.

    Raises:
        DataError: the template refuses one, or leaves out a message.
    """
    total = source.num_prompts or _SAMPLE
    if isinstance(source, TaskSource):
        total = min(total, _SAMPLE)  # its problems have one form
    seen: set[tuple[str, ...]] = set()
    lengths: list[int] = []
    for index in range(total):
        raw = source.get(index)
        roles = tuple(message.role for message in raw.messages)
        is_new = roles not in seen
        if is_new or index % max(1, total // _SAMPLE) == 0:
            lengths.append(view.num_prompt_tokens(raw))
        if is_new:
            seen.add(roles)
            view.check_roles(raw)
    return lengths


def checked_view(config: RunConfig, rollouts: Sequence[Rollout]) -> TeacherView:
    """Build the view, and check that every teacher fits the student and every rollout has one.

    Raises:
        HandshakeError: a teacher does not fit.
        DataError: a rollout has no teacher.
    """
    view = build_view(config)
    for rollout in rollouts:
        view.job(rollout)
    student = load_identity(config.student.model, weights=False)
    for teacher in config.teachers:
        view.check(student, load_identity(teacher.section.model, weights=False))
    return view


def has_context(config: RunConfig) -> bool:
    """Return whether the teacher reads something else than the student's prompts."""
    teacher = config.only_teacher
    return teacher is not None and teacher.context is not None


def build_own_view(config: RunConfig) -> AlignedView | None:
    """Build the view of a teacher with a tokenizer of its own; None of another teacher.

    Raises:
        HandshakeError: see `build_view`.
    """
    teacher = config.only_teacher
    if teacher is None or not teacher.has_own_tokenizer:
        return None
    return own_tokenizer_view(
        config.student.model,
        teacher.model,
        special_tokens=teacher.special_tokens,
        template_arguments=teacher.template_arguments,
        context_length=teacher_context_length(teacher),
    )


def special_token_lines(config: RunConfig) -> tuple[str, ...] | None:
    """List how the student's special tokens map to the teacher's; None where none need to be.

    Raises:
        HandshakeError: see `build_view`.
    """
    teacher = config.only_teacher
    if teacher is None or not teacher.has_own_tokenizer:
        return None
    found = special_tokens_of(
        config.student.model, teacher.model, teacher.special_tokens, teacher.template_arguments
    )
    return ("the tokenizers are the same, token by token",) if found is None else found.lines


def refuse_own_tokenizer(config: RunConfig, what: str) -> None:
    """Refuse what needs a score per token from a teacher that scores spans.

    Args:
        what: what needs them, for the error.

    Raises:
        ConfigError: the config has such a teacher.
    """
    teacher = config.only_teacher
    if teacher is not None and teacher.has_own_tokenizer:
        raise ConfigError(
            f"scoring.tokenizer=own with {what}: it needs a score per token, and this teacher "
            "scores spans of tokens; use `qwen3-distill run`, or a teacher with the student's "
            "tokenizer"
        )
