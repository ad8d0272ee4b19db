"""A prompt before its chat template, and the sources that give prompts by number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias

from qwen3_distill.data.tasks import Task
from qwen3_distill.errors import DataError

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]

ANSWER_KEY = "answer"
"""Key of `RawPrompt.task_data` that holds the reference answer."""
PROBLEM_KEY = "problem"
"""Key of `RawPrompt.task_data` that holds the problem's text, for procedural tasks only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RawPrompt:
    """A prompt before the chat template: messages, the last of them a user's or a tool's."""

    prompt_id: str
    messages: tuple[Message, ...]
    task_data: Mapping[str, str] = field(default_factory=dict)
    """Input of the verifier: `ANSWER_KEY`, `PROBLEM_KEY`; and where there are several teachers the
    tag, `tags.TAG_KEY`."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the row for the teacher's context; empty without one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_data", MappingProxyType(dict(self.task_data)))


class PromptSource(Protocol):
    """Gives prompts by number. The same number always gives the same prompt."""

    @property
    def num_prompts(self) -> int | None:
        """Number of prompts; None: endless."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts about the rows that the user is told, one sentence each."""
        ...

    def get(self, index: int) -> RawPrompt:
        """Return prompt number ``index``, from 0.

        Raises:
            IndexError: ``index`` is negative or not below `num_prompts`.
        """
        ...


class FixedSource:
    """A source of given prompts, at least one."""

    def __init__(self, prompts: Sequence[RawPrompt], notes: Sequence[str] = ()) -> None:
        if not prompts:
            raise DataError("a prompt source has no prompts, expected at least one")
        self._prompts = tuple(prompts)
        self._notes = tuple(notes)

    @property
    def num_prompts(self) -> int:
        return len(self._prompts)

    @property
    def notes(self) -> tuple[str, ...]:
        return self._notes

    def get(self, index: int) -> RawPrompt:
        _check_index(index, self.num_prompts)
        return self._prompts[index]


class TaskSource:
    """A source of one split of a procedural task; problems are made on demand."""

    def __init__(
        self, task: Task, split: Literal["train", "eval"], limit: int | None, *, first: int = 0
    ) -> None:
        self._task = task
        self._first = first
        self._split: Literal["train", "eval"] = split
        self._limit = limit

    @property
    def num_prompts(self) -> int | None:
        return self._limit

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def get(self, index: int) -> RawPrompt:
        _check_index(index, self._limit)
        problem = self._task.problem(self._split, self._first + index)
        return RawPrompt(
            prompt_id=problem.problem_id,
            messages=(Message(role="user", content=problem.text),),
            task_data={PROBLEM_KEY: problem.text, ANSWER_KEY: problem.answer},
            row={PROBLEM_KEY: problem.text, ANSWER_KEY: problem.answer},
        )


def _check_index(index: int, num_prompts: int | None) -> None:
    if index < 0 or (num_prompts is not None and index >= num_prompts):
        raise IndexError(f"prompt {index} of a source with {num_prompts or 'endless'} prompts")
