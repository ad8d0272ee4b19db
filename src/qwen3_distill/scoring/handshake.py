"""Checks before the first score: models that match, jobs that fit."""

from collections.abc import Sequence

from qwen3_distill.errors import DataError, HandshakeError
from qwen3_distill.types import ModelIdentity, ScoringJob

_REMEDY = {
    "tokenizer_digest": "use a teacher with the student's tokenizer (same tokenizer.json), or set "
    "scoring.tokenizer=own (docs/guide/teachers.md)",
    "vocab_size": "use models with equally many output rows; nothing is cut or padded for you",
    "eos_ids": "make eos_token_id in both generation_config.json the same, or a student that "
    "learned to stop would be scored on another stop token",
    "chat_template_digest": "copy one chat template into both directories, or the teacher scores "
    "prompts in a form it was not trained on; scoring.tokenizer=own keeps the teacher's",
}

COMPARED = tuple(_REMEDY)
"""Fields of `ModelIdentity` that must be equal."""


def check_compatible(student: ModelIdentity, teacher: ModelIdentity) -> None:
    """Raise unless tokenizer, vocabulary, end-of-sequence ids and chat template are equal.

    Raises:
        HandshakeError: names every difference and its remedy.
    """
    problems = [f"{name}: {text}" for name, text in differences(student, teacher).items()]
    if problems:
        raise HandshakeError(
            f"student {student.name} and teacher {teacher.name} do not match:\n  "
            + "\n  ".join(problems)
        )


def differences(student: ModelIdentity, teacher: ModelIdentity) -> dict[str, str]:
    """Return what differs and must not, by the name of `COMPARED`, each with its remedy."""
    found: dict[str, str] = {}
    for name, remedy in _REMEDY.items():
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            found[name] = f"student {_short(ours)}, teacher {_short(theirs)}; {remedy}"
    return found


def check_lengths(jobs: Sequence[ScoringJob], teacher: ModelIdentity) -> None:
    """Raise unless every job fits the teacher's context.

    Raises:
        DataError: names the first job that does not.
    """
    for job in jobs:
        if job.token_ids.size > teacher.context_length:
            raise DataError(
                f"rollout {job.rollout_id} has {job.token_ids.size} tokens, more than the "
                f"teacher's context of {teacher.context_length}; lower sampling.max_new_tokens"
            )


def _short(value: object) -> str:
    if isinstance(value, frozenset):
        return str(sorted(value))
    text = str(value)
    return text[:12] if len(text) > 24 else text
