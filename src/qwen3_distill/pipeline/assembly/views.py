"""Builds the view by which the config's teacher reads rollouts."""

from qwen3_distill.config import RunConfig
from qwen3_distill.errors import ConfigError
from qwen3_distill.scoring.aligned_view import (
    AlignedView,
    own_tokenizer_view,
    special_tokens_of,
)
from qwen3_distill.scoring.context import ContextView
from qwen3_distill.scoring.views import SameView, TeacherView


def build_view(config: RunConfig) -> TeacherView:
    """Build the view from the files of student and teacher, without their weights.

    Raises:
        HandshakeError: the teacher's own tokens cannot be aligned with the student's.
        ModelError: a file is missing or damaged.
    """
    if config.scoring is not None and config.scoring.context is not None:
        return ContextView()
    return build_own_view(config) or SameView()


def build_own_view(config: RunConfig) -> AlignedView | None:
    """Build the view of a teacher with a tokenizer of its own; None of another teacher.

    Raises:
        HandshakeError: see `build_view`.
    """
    scoring = config.scoring
    if scoring is None or not scoring.has_own_tokenizer:
        return None
    return own_tokenizer_view(
        config.student.model,
        scoring.model,
        special_tokens=scoring.special_tokens,
        template_arguments=scoring.template_arguments,
    )


def special_token_lines(config: RunConfig) -> tuple[str, ...] | None:
    """List how the student's special tokens map to the teacher's; None where none need to be.

    Raises:
        HandshakeError: see `build_view`.
    """
    scoring = config.scoring
    if scoring is None or not scoring.has_own_tokenizer:
        return None
    found = special_tokens_of(
        config.student.model, scoring.model, scoring.special_tokens, scoring.template_arguments
    )
    return ("the tokenizers are the same, token by token",) if found is None else found.lines


def refuse_own_tokenizer(config: RunConfig, what: str) -> None:
    """Refuse what needs a score per token from a teacher that scores spans.

    Args:
        what: what needs them, for the error.

    Raises:
        ConfigError: the config has such a teacher.
    """
    if config.scoring is not None and config.scoring.has_own_tokenizer:
        raise ConfigError(
            f"scoring.tokenizer=own with {what}: it needs a score per token, and this teacher "
            "scores spans of tokens; use `qwen3-distill run`, or a teacher with the student's "
            "tokenizer"
        )
