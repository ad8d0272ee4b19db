"""Renders raw prompts to token ids, and gives the order in which a run draws them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen3_distill.data.sources import PromptSource, RawPrompt
from qwen3_distill.data.template_arguments import check_template_arguments, template_of
from qwen3_distill.errors import DataError
from qwen3_distill.types import Prompt
from qwen3_distill.utils.seeds import derive_seed


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
) -> Prompt:
    """Render ``raw`` with the student's chat template, up to where the response begins.

    Args:
        context_length: Positions of the model: prompt and response together must fit.
        max_new_tokens: Longest response that will be sampled.
        template_arguments: Passed to the template, e.g. ``{"enable_thinking": False}``.

    Raises:
        DataError: the tokenizer has no chat template, the template refuses the messages, or
            prompt and response do not fit the context.
    """
    token_ids = _template_ids(raw, tokenizer, template_arguments)
    if len(token_ids) + max_new_tokens > context_length:
        raise DataError(
            f"prompt {raw.prompt_id} (numbered from 0) has {len(token_ids)} tokens, and with "
            f"sampling.max_new_tokens={max_new_tokens} it exceeds the model's context of "
            f"{context_length} tokens; shorten or remove the prompt, or lower max_new_tokens"
        )
    return Prompt(
        prompt_id=raw.prompt_id,
        token_ids=np.asarray(token_ids, dtype=np.int32),
        task_data=raw.task_data,
    )


def _template_ids(
    raw: RawPrompt, tokenizer: ChatTokenizer, template_arguments: Mapping[str, Any]
) -> list[int]:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            "the student's tokenizer has no chat template, so prompts cannot be rendered; use an "
            "instruction-tuned student, or put chat_template.jinja into its directory"
        )
    messages: list[Mapping[str, str]] = [
        {"role": message.role, "content": message.content} for message in raw.messages
    ]
    try:
        # transformers 5 returns a BatchEncoding unless told otherwise.
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **template_arguments,
        )
    except (TypeError, ValueError) as error:
        raise DataError(
            f"prompt {raw.prompt_id} cannot be rendered with student.template_arguments="
            f"{dict(template_arguments)}: {error}"
        ) from error
    except TemplateError as error:
        roles = [message.role for message in raw.messages]
        raise DataError(
            f"prompt {raw.prompt_id}: the student's chat template refuses messages of the roles "
            f"{roles} ({error}); change the messages, or unset prompts.system"
        ) from error


class PromptStream:
    """An endless, reproducible sequence of prompts; a position in it is one integer.

    Epoch e covers the numbers ``[e * n, (e + 1) * n)`` of a source with n prompts: every prompt
    once, in an order that depends on ``seed`` and e only. An endless source keeps its own order.
    Taking prompts changes nothing but a cache, so a resumed run needs only the number of prompts
    drawn so far.

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
    ) -> None:
        check_template_arguments(template_of(tokenizer), template_arguments)
        self._source = source
        self._tokenizer = tokenizer
        self._seed = seed
        self._context_length = context_length
        self._max_new_tokens = max_new_tokens
        self._template_arguments = template_arguments
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def take(self, start: int, count: int) -> list[Prompt]:
        """Return prompts number ``start`` to ``start + count - 1``, rendered.

        Raises:
            DataError: a prompt cannot be rendered, see `render`.
            ValueError: ``start`` or ``count`` is negative.
        """
        if start < 0 or count < 0:
            raise ValueError(f"start={start}, count={count}: expected both >= 0")
        return [self._prompt(number) for number in range(start, start + count)]

    def check(self) -> None:
        """Render every prompt of a finite source, so that a bad one fails now.

        Raises:
            DataError: a prompt cannot be rendered, see `render`.
        """
        for index in range(self._source.num_prompts or 0):
            self._render(index)

    def _prompt(self, number: int) -> Prompt:
        return self._render(self._index(number))

    def _render(self, index: int) -> Prompt:
        return render(
            self._source.get(index),
            self._tokenizer,
            self._context_length,
            self._max_new_tokens,
            self._template_arguments,
        )

    def _index(self, number: int) -> int:
        num_prompts = self._source.num_prompts
        if num_prompts is None:
            return number
        epoch, position = divmod(number, num_prompts)
        if epoch != self._epoch:
            self._permutation = epoch_permutation(self._seed, epoch, num_prompts)
            self._epoch = epoch
        return int(self._permutation[position])


def epoch_permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """[size] the order of one epoch: a permutation of ``0 .. size - 1``."""
    # Sorted raw bits, because numpy promises the bit stream of a bit generator across versions,
    # but not the result of Generator.permutation.
    bits = np.random.PCG64(derive_seed(seed, "prompt-order", epoch)).random_raw(size)
    return np.argsort(bits, kind="stable").astype(np.int64)
