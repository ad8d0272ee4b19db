"""The first prompt of a run, as the chat template renders it."""

from collections.abc import Sequence
from dataclasses import dataclass

from qwen3_distill.errors import DataError
from qwen3_distill.report.rollout_view import readable
from qwen3_distill.report.run_files import RunFiles


@dataclass(frozen=True)
class PromptPiece:
    """Text of the prompt, or one special token with its id."""

    text: str
    token_id: int | None


@dataclass(frozen=True)
class PromptSection:
    """The prompt in pieces, and what its template does as (name, value)."""

    prompt_id: str
    pieces: Sequence[PromptPiece]
    facts: Sequence[tuple[str, str]]


def prompt_section(run: RunFiles) -> PromptSection | None:
    """Read ``prompt.json``; None where the run has none.

    Raises:
        DataError: the file does not hold a prompt.
    """
    if run.prompt is None:
        return None
    try:
        return PromptSection(
            prompt_id=readable(str(run.prompt["prompt_id"])),
            pieces=[PromptPiece(readable(text), token) for text, token in run.prompt["pieces"]],
            facts=[(str(name), readable(value)) for name, value in run.prompt["facts"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"prompt.json holds no rendered prompt ({error!r}); remove the file to report without"
        ) from error
