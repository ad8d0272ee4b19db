"""Renders raw prompts to token ids, and gives the order in which a run draws them."""

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen3_distill.data.rendering import TemplateFault, apply_template
from qwen3_distill.data.sources import (
    FixedSource,
    Message,
    PromptSource,
    RawPrompt,
    TaskSource,
)
from qwen3_distill.data.tags import TAG_KEY, TagSchedule, group_by_tag
from qwen3_distill.data.template_arguments import check_template_arguments, template_of
from qwen3_distill.errors import DataError
from qwen3_distill.types import Prompt
from qwen3_distill.utils.seeds import derive_seed
from qwen3_distill.utils.shown import shortened, shown

if TYPE_CHECKING:
    from qwen3_distill.data.teacher_context import TeacherContext

Who = Literal["student", "teacher"]
"""Whose chat template renders messages."""
_TASK_PROMPTS_CHECKED = 1000
_ENDLESS_PROMPTS_CHECKED = 4
"""Enough to see that the chat template renders them; every run does it at its start."""
_ENDLESS_SEARCH = 1_000_000
_PROBE = "qwen3distillprobe"
"""Text that no template contains."""


class PromptTooLong(DataError):
    """A prompt and its response do not fit the model's context."""


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rendering needs."""

    @property
    def chat_template(self) -> Any: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


def render(
    raw: RawPrompt,
    tokenizer: ChatTokenizer,
    context_length: int,
    max_new_tokens: int,
    template_arguments: Mapping[str, Any] = MappingProxyType({}),
    context: "TeacherContext | None" = None,
) -> Prompt:
    """Render ``raw`` with the student's chat template, up to where the response begins.

    Args:
        context_length: Positions of the model: prompt and response together must fit.
        max_new_tokens: Longest response that will be sampled.
        template_arguments: Passed to the template, e.g. ``{"enable_thinking": False}``.
        context: Renders what the teacher reads instead; None: it reads the same tokens.

    Raises:
        DataError: the tokenizer has no chat template or the template refuses the messages.
        PromptTooLong: prompt and response do not fit the context, the student's or the teacher's.
    """
    token_ids = template_ids(raw, tokenizer, template_arguments)
    if len(token_ids) + max_new_tokens > context_length:
        raise PromptTooLong(
            f"prompt {raw.prompt_id} (numbered from 0) has {len(token_ids)} tokens, and with "
            f"sampling.max_new_tokens={max_new_tokens} it exceeds the model's context of "
            f"{context_length} tokens; shorten or remove the prompt, lower max_new_tokens, or "
            "leave such prompts out with prompts.too_long=drop"
        )
    return Prompt(
        prompt_id=raw.prompt_id,
        token_ids=np.asarray(token_ids, dtype=np.int32),
        task_data=raw.task_data,
        teacher_ids=None if context is None else context.ids(raw, max_new_tokens),
        messages=tuple((message.role, message.content) for message in raw.messages),
    )


def template_ids(
    raw: RawPrompt,
    tokenizer: ChatTokenizer,
    template_arguments: Mapping[str, Any],
    *,
    who: Who = "student",
) -> list[int]:
    """Render messages with a chat template; return the token ids up to the response's start.

    Raises:
        DataError: the tokenizer has no chat template or the template refuses the messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            f"the {who}'s tokenizer has no chat template, so prompts cannot be rendered; use an "
            "instruction-tuned student, or put chat_template.jinja into its directory"
        )
    try:
        # transformers 5 returns a BatchEncoding unless told otherwise.
        return apply_template(
            tokenizer,
            _as_dicts(raw.messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **template_arguments,
        )
    except (TypeError, ValueError) as error:
        raise DataError(
            f"prompt {raw.prompt_id} cannot be rendered with student.template_arguments="
            f"{dict(template_arguments)}: {shortened(str(error))}"
        ) from error
    except TemplateFault as error:
        raise DataError(
            f"prompt {raw.prompt_id}: the {who}'s chat template fails ({error}); correct the "
            "template, or take another model"
        ) from error
    except TemplateError as error:
        roles = [message.role for message in raw.messages]
        raise DataError(
            f"prompt {raw.prompt_id}: the {who}'s chat template refuses messages of the roles "
            f"{shown(roles)} ({shortened(str(error))}); change the messages, or unset "
            + ("prompts.system" if who == "student" else "scoring.context.system")
        ) from error


def check_roles(
    raw: RawPrompt,
    tokenizer: ChatTokenizer,
    template_arguments: Mapping[str, Any] = MappingProxyType({}),
    *,
    who: Who = "student",
) -> None:
    """Check that every message of a role other than the assistant's reaches the prompt's text.

    A template skips the messages of a role that it does not know, without an error.

    Raises:
        DataError: a message is skipped.
    """
    for index, message in enumerate(raw.messages):
        if message.role == "assistant":
            continue
        probed = [*raw.messages]
        probed[index] = Message(role=message.role, content=_PROBE)
        text = _role_text(tokenizer, probed, template_arguments)
        if isinstance(text, str) and _PROBE not in text:
            raise DataError(
                f"prompt {raw.prompt_id} (numbered from 0): the {who}'s chat template leaves out "
                f"message {index} of role {message.role!r}, expected it to render every message; "
                "change the message's role, or remove it"
            )


def _role_text(
    tokenizer: ChatTokenizer, messages: Iterable[Message], template_arguments: Mapping[str, Any]
) -> Any:
    """Render a conversation like one that was rendered before; None where that fails."""
    from jinja2 import TemplateError

    try:
        return apply_template(
            tokenizer,
            _as_dicts(messages),
            add_generation_prompt=True,
            tokenize=False,
            **template_arguments,
        )
    except (TemplateError, TypeError, ValueError):  # it looks at what the messages say
        return None


def _as_dicts(messages: Iterable[Message]) -> list[Mapping[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


class PromptStream:
    """An endless, reproducible sequence of prompts; a position in it is one integer.

    Epoch e covers the numbers ``[e * n, (e + 1) * n)`` of a source with n prompts: every prompt
    once, in an order that depends on ``seed`` and e only. An endless source keeps its own order.
    Taking prompts changes nothing but a cache, so a resumed run needs only the number of prompts
    drawn so far.

    With weights, tags take turns as `TagSchedule` says, and every tag has epochs of its own.

    Args:
        tag_weights: weight of every tag's prompts; None: all prompts are drawn alike.

    Raises:
        ConfigError: the chat template does not read one of ``template_arguments``, or reads it as
            another type.
    """

    def __init__(
        self,
        source: PromptSource,
        tokenizer: ChatTokenizer,
        *,
        seed: int,
        context_length: int,
        max_new_tokens: int,
        template_arguments: Mapping[str, Any] = MappingProxyType({}),
        context: "TeacherContext | None" = None,
        tag_weights: Mapping[str, float] | None = None,
    ) -> None:
        check_template_arguments(template_of(tokenizer), template_arguments)
        self.source = source
        self.notes = source.notes
        """Facts about the prompts that the user is told, one sentence each."""
        self.num_dropped = 0
        """Prompts that were left out because they are too long."""
        self._tokenizer = tokenizer
        self._seed = seed
        self._context_length = context_length
        self._max_new_tokens = max_new_tokens
        self._template_arguments = template_arguments
        self._context = context
        self._schedule = None if tag_weights is None else TagSchedule(tag_weights)
        self._rows_by_tag: dict[str, list[int]] | None = None
        self._orders: dict[str, tuple[int, NDArray[np.int64]]] = {}
        """The last epoch and its order, by tag; without weights all prompts are together."""

    @property
    def has_context(self) -> bool:
        """Whether the teacher reads something else than the student's prompts."""
        return self._context is not None

    def take(self, start: int, count: int) -> list[Prompt]:
        """Return prompts number ``start`` to ``start + count - 1``, rendered.

        Raises:
            DataError: a prompt cannot be rendered, see `render`.
            ValueError: ``start`` or ``count`` is negative.
        """
        if start < 0 or count < 0:
            raise ValueError(f"start={start}, count={count}: expected both >= 0")
        return [self._prompt(number) for number in range(start, start + count)]

    def find(self, prompt_ids: Collection[str]) -> dict[str, Prompt]:
        """Return the prompts of these ids, rendered; without those that the source does not have.

        Of an endless source the first ones are looked through, a million at most.

        Raises:
            DataError: a prompt cannot be rendered, see `render`.
        """
        found: dict[str, Prompt] = {}
        for index in range(self.source.num_prompts or _ENDLESS_SEARCH):
            if len(found) == len(prompt_ids):
                break
            if (prompt_id := self.source.get(index).prompt_id) in prompt_ids:
                found[prompt_id] = self._render(index)
        return found

    def check(self) -> None:
        """Render every prompt of a finite source, so that a bad one fails now.

        Of a task or another endless source only the first ones: its problems have one form.

        Raises:
            DataError: a prompt cannot be rendered, see `render`.
        """
        seen: set[tuple[str, ...]] = set()
        total = self.source.num_prompts
        if total is None:
            total = _ENDLESS_PROMPTS_CHECKED
        elif isinstance(self.source, TaskSource):
            total = min(total, _TASK_PROMPTS_CHECKED)
        for index in range(total):
            self._render(index)
            raw = self.source.get(index)
            roles = tuple(message.role for message in raw.messages)
            if roles not in seen:
                seen.add(roles)
                check_roles(raw, self._tokenizer, self._template_arguments)
                if self._context is not None:
                    self._context.check_roles(raw)
        for tag in self._schedule.tags if self._schedule else ():
            self._rows_of(tag)

    def drop_too_long(self) -> None:
        """Leave out the prompts of a finite source that do not fit the context, and count them.

        Raises:
            DataError: a prompt cannot be rendered, or none is left.
        """
        kept: list[RawPrompt] = []
        dropped: list[str] = []
        for index in range(self.source.num_prompts or 0):
            raw = self.source.get(index)
            try:
                self._render(index)
                kept.append(raw)
            except PromptTooLong:
                dropped.append(raw.prompt_id)
        if not dropped:
            return
        what = (
            f"{len(dropped)} of {len(dropped) + len(kept)} prompts do not fit the context of "
            f"{self._context_length} tokens with max_new_tokens={self._max_new_tokens}"
        )
        if self._context is not None:
            what += f", or with scoring.context the teacher's of {self._context.context_length}"
        if not kept:
            raise DataError(f"{what}: none is left; lower max_new_tokens or shorten the prompts")
        self.source, self.num_dropped = FixedSource(kept), len(dropped)
        self._rows_by_tag = None
        self.notes = (*self.notes, f"{what} and are left out, e.g. {dropped[0]}")

    def _prompt(self, number: int) -> Prompt:
        return self._render(self._index(number))

    def _render(self, index: int) -> Prompt:
        return render(
            self.source.get(index),
            self._tokenizer,
            self._context_length,
            self._max_new_tokens,
            self._template_arguments,
            self._context,
        )

    def _index(self, number: int) -> int:
        num_prompts = self.source.num_prompts
        if num_prompts is None:
            return number
        if self._schedule is None:
            return self._in_order("", number, num_prompts)
        tag, count = self._schedule.place(number)
        rows = self._rows_of(tag)
        return rows[self._in_order(tag, count, len(rows))]

    def _in_order(self, tag: str, number: int, size: int) -> int:
        """Return which of ``size`` prompts has a number, if every epoch has an order of its own."""
        epoch, position = divmod(number, size)
        known = self._orders.get(tag)
        if known is None or known[0] != epoch:
            known = epoch, epoch_permutation(self._seed, epoch, size, tag)
            self._orders[tag] = known
        return int(known[1][position])

    def _rows_of(self, tag: str) -> list[int]:
        if self._rows_by_tag is None:
            count = self.source.num_prompts or 0
            tags = (self.source.get(index).task_data[TAG_KEY] for index in range(count))
            self._rows_by_tag = group_by_tag(tags)
        rows = self._rows_by_tag.get(tag)
        if rows is None:
            raise DataError(
                f"no prompt has the tag {tag!r}, expected at least one for every teacher with a "
                "weight; add rows, or remove the teacher"
            )
        return rows


def epoch_permutation(seed: int, epoch: int, size: int, tag: str = "") -> NDArray[np.int64]:
    """[size] the order of one epoch, of one tag's prompts: a permutation of ``0 .. size - 1``."""
    # Sorted raw bits, because numpy promises the bit stream of a bit generator across versions,
    # but not the result of Generator.permutation.
    purpose = f"prompt-order/{tag}" if tag else "prompt-order"
    bits = np.random.PCG64(derive_seed(seed, purpose, epoch)).random_raw(size)
    return np.argsort(bits, kind="stable").astype(np.int64)
