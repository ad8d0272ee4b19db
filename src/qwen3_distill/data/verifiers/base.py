"""The port of verifiers, and how they read a prompt's task data."""

from typing import Protocol

from qwen3_distill.data.sources import RawPrompt
from qwen3_distill.errors import DataError
from qwen3_distill.types import Prompt


class Verifier(Protocol):
    """Judges responses. The text is decoded without special tokens."""

    def check(self, prompt: Prompt | RawPrompt) -> None:
        """Check that responses to the prompt can be judged.

        Raises:
            DataError: the prompt has no usable reference answer.
        """
        ...

    def correct(self, prompt: Prompt, response_text: str) -> bool | float:
        """Return whether the response is right, or its reward in [0, 1].

        A response never raises an error, unless a user's function or pattern fails on it.

        Raises:
            DataError: the prompt has no usable reference answer; a user's function gave no reward.
            EngineError: a user's pattern took too long.
        """
        ...


def task_value(prompt: Prompt | RawPrompt, key: str) -> str:
    if key not in prompt.task_data:
        raise DataError(
            f"prompt {prompt.prompt_id} has no {key!r} in its task data, which holds "
            f"{sorted(prompt.task_data)}; set prompts.answer_field, or use a verifier of the "
            "prompts' own kind"
        )
    return prompt.task_data[key]
