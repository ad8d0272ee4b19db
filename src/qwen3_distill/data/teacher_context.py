"""Renders what a teacher reads in place of the student's prompt: other messages, one response."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from jinja2 import (
    StrictUndefined,
    TemplateError,
    TemplateRuntimeError,
    Undefined,
    UndefinedError,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import missing

from qwen3_distill.config import ContextConfig
from qwen3_distill.data.prompts import ChatTokenizer, PromptTooLong, check_roles, template_ids
from qwen3_distill.data.rendering import probe_once, within_limits
from qwen3_distill.data.sources import ANSWER_KEY, Message, RawPrompt
from qwen3_distill.data.sources.fields import missing_field
from qwen3_distill.errors import DataError
from qwen3_distill.types import IntArray
from qwen3_distill.utils.shown import shortened, shown

_WHO = "teacher"


class TeacherContext:
    """Renders the teacher's messages of a prompt with the teacher's chat template.

    Args:
        config: the templates of the messages.
        tokenizer: the teacher's.
        context_length: Positions of the teacher: its context and the response must fit together.
        template_arguments: Passed to the chat template, as for the student's prompts.
    """

    def __init__(
        self,
        config: ContextConfig,
        tokenizer: ChatTokenizer,
        *,
        context_length: int,
        template_arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.context_length = context_length
        self._config = config
        self._tokenizer = tokenizer
        self._template_arguments = template_arguments
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, undefined=_Missing, finalize=_printable
        )
        self._sources = config.templates
        self._templates = {
            name: environment.from_string(text) for name, text in self._sources.items()
        }

    def ids(self, raw: RawPrompt, max_new_tokens: int) -> IntArray:
        """[C] token ids that the teacher reads before a response to ``raw``.

        Raises:
            DataError: a template reads what the row does not have, fails, or renders to nothing; or
                the chat template refuses the messages.
            PromptTooLong: the context and the longest response do not fit the teacher's context.
        """
        ids = template_ids(self._told(raw), self._tokenizer, self._template_arguments, who=_WHO)
        if len(ids) + max_new_tokens > self.context_length:
            raise PromptTooLong(
                f"prompt {raw.prompt_id} (numbered from 0): with scoring.context the teacher reads "
                f"{len(ids)} tokens before the response, and with sampling.max_new_tokens="
                f"{max_new_tokens} that exceeds the teacher's context of {self.context_length} "
                "tokens; shorten scoring.context or the prompt, lower max_new_tokens, or leave "
                "such prompts out with prompts.too_long=drop"
            )
        return np.asarray(ids, dtype=np.int32)

    def check_roles(self, raw: RawPrompt) -> None:
        """Check that the teacher's chat template leaves out no message.

        Raises:
            DataError: it does.
        """
        check_roles(self._told(raw), self._tokenizer, self._template_arguments, who=_WHO)

    def _told(self, raw: RawPrompt) -> RawPrompt:
        """Return the prompt with the messages that the teacher reads."""
        return RawPrompt(prompt_id=raw.prompt_id, messages=tuple(self._messages(raw)))

    def _messages(self, raw: RawPrompt) -> Iterator[Message]:
        config, values = self._config, _values(raw)

        def text(name: str) -> str:
            return self._text(name, values, raw)

        opening = [m for m in raw.messages[:1] if m.role in ("system", "developer")]
        if config.system is not None:
            role = opening[0].role if opening else "system"
            yield Message(role=role, content=text("system"))
        else:
            yield from opening
        for number in range(len(config.examples)):
            yield Message(role="user", content=text(f"examples.{number}.user"))
            yield Message(role="assistant", content=text(f"examples.{number}.assistant"))
        last = _last_user(raw.messages)
        for index, message in enumerate(raw.messages[len(opening) :], len(opening)):
            replaced = index == last and config.user is not None
            yield Message(role=message.role, content=text("user")) if replaced else message

    def _text(self, name: str, values: Mapping[str, Any], raw: RawPrompt) -> str:
        where = f"prompt {raw.prompt_id} (numbered from 0): scoring.context.{name}"
        try:
            probe_once(self._sources[name], {**values, "row": dict(raw.row)})
            text = within_limits(lambda: self._templates[name].render(**values))
            text.encode("utf-8")
        except UndefinedError as error:
            raise DataError(f"{where}: {shortened(str(error.message))}") from None
        except UnicodeEncodeError:
            raise DataError(f"{where} renders half of a character; correct the row") from None
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"{where} cannot be rendered ({shortened(str(error))}); correct the template or "
                "the row"
            ) from None
        if not text.strip():
            raise DataError(
                f"{where} renders to an empty text, expected what the teacher is told; correct "
                "the template or the row"
            )
        return text


def _values(raw: RawPrompt) -> dict[str, Any]:
    first = raw.messages[0]
    return {
        "prompt": raw.messages[_last_user(raw.messages)].content,
        "system": first.content if first.role in ("system", "developer") else "",
        "messages": [{"role": m.role, "content": m.content} for m in raw.messages],
        "row": _Row(raw.row),
        **({"answer": raw.task_data[ANSWER_KEY]} if ANSWER_KEY in raw.task_data else {}),
    }


def _last_user(messages: Sequence[Message]) -> int:
    return max(index for index, message in enumerate(messages) if message.role == "user")


class _Row:
    """The fields of a row, which a template reads as ``row.name`` or ``row["name"]``.

    No dict: its methods would hide fields of their names.
    """

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)


class _Missing(StrictUndefined):
    """A value that is not there; to use it in any way but ``is defined`` is an error."""

    __slots__ = ()

    def __init__(
        self,
        hint: str | None = None,
        obj: Any = missing,
        name: str | None = None,
        exc: type[TemplateRuntimeError] = UndefinedError,
    ) -> None:
        super().__init__(hint or _explained(obj, name), obj, name, exc)


def _explained(obj: Any, name: str | None) -> str:
    if isinstance(obj, _Row):
        return missing_field(str(name), obj, "scoring.context", "the row")
    if name == ANSWER_KEY and obj is missing:
        return (
            "it reads `answer`, and the row has no reference answer; set prompts.answer_field, or "
            "change scoring.context"
        )
    if obj is missing:
        return f"it reads `{name}`, which is not set; change scoring.context"
    return f"{shown(obj)} has no {name!r}; change scoring.context or the data"


def _printable(value: Any) -> Any:
    """Return what a template writes; refuse what it would write as Python's ``repr``."""
    if isinstance(value, str | Undefined) or (
        isinstance(value, int | float) and not isinstance(value, bool)
    ):
        return value
    _refuse(value)


def _refuse(value: Any) -> NoReturn:
    found = "null" if value is None else f"of type {type(value).__name__} ({shown(value)})"
    raise ValueError(
        f"a value that it writes is {found}, expected text or a number; test it with `if`, loop "
        "over it, or write it with the filter tojson"
    )
