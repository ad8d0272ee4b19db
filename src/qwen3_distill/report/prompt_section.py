"""The first prompt of a run, as the chat template renders it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_distill.errors import DataError
from qwen3_distill.recording.records import is_count
from qwen3_distill.report.rollout_view import readable
from qwen3_distill.report.run_files import RunFiles
from qwen3_distill.utils.shown import shown


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
    values: list[Any] = [run.prompt.get(key) for key in ("prompt_id", "pieces", "facts")]
    prompt_id, pieces, facts = values
    if not (isinstance(prompt_id, str) and _are_pieces(pieces) and _are_facts(facts)):
        raise DataError(
            "prompt.json holds no rendered prompt: expected prompt_id, pieces of text and token "
            f"id, and facts; got {shown(run.prompt)}; remove the file to report without"
        )
    return PromptSection(
        prompt_id=readable(prompt_id),
        pieces=[PromptPiece(readable(text), token) for text, token in pieces],
        facts=[(name, readable(value)) for name, value in facts],
    )


def _are_pieces(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and (pair[1] is None or is_count(pair[1]))
        for pair in values
    )


def _are_facts(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in values
    )
