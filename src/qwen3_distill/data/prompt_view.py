"""Shows what a chat template does: one rendered prompt, its special tokens, and how a turn ends."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from qwen3_distill.data.rendering import apply_template
from qwen3_distill.data.template_arguments import arguments_read, template_of

_CONTENT = "The answer is 42."
_OPEN, _CLOSE = "<think>", "</think>"

Thinking = Literal["on", "off"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedToken:
    """A token with its id."""

    token_id: int
    text: str

    def __str__(self) -> str:
        return f"{self.text} ({self.token_id})"


@dataclass(frozen=True, kw_only=True, slots=True)
class EndOfTurn:
    """The tokens that a chat template writes after an assistant's message."""

    token_ids: tuple[int, ...]
    token: NamedToken | None
    """The first special token there, else the first token; None: the template writes nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptView:
    """A rendered prompt as people read it."""

    prompt_id: str
    pieces: tuple[tuple[str, int | None], ...]
    """Text in order; a special token stands alone, with its id."""
    num_tokens: int
    thinking: Thinking | None
    """None: the template knows no thinking."""
    end_of_turn: EndOfTurn | None
    """None: the template renders no conversation that ends with an assistant's message."""
    end_tokens: tuple[NamedToken, ...]
    """The tokens that end a rollout."""
    teacher_text: str | None = None
    """The prompt as the teacher reads it, where it has a context of its own; else None."""

    @property
    def special_tokens(self) -> list[tuple[NamedToken, int]]:
        """Each special token of the prompt and how often it occurs, in order."""
        counts = Counter(
            NamedToken(token_id=token_id, text=text)
            for text, token_id in self.pieces
            if token_id is not None
        )
        return list(counts.items())

    def facts(self) -> list[tuple[str, str]]:
        """Return (name, value) of what the template does."""
        special = [f"{token} x {count}" for token, count in self.special_tokens]
        found = [
            ("tokens", f"{self.num_tokens:,}"),
            ("special tokens", ", ".join(special) or "none"),
            ("thinking", _THINKING[self.thinking]),
        ]
        if self.end_of_turn is not None:
            token = self.end_of_turn.token
            found.append(("the template ends an assistant's turn with", str(token or "nothing")))
        found.append(("a rollout ends at", ", ".join(map(str, self.end_tokens))))
        return found

    def lines(self) -> list[str]:
        """Return the prompt and the facts as lines for a terminal."""
        text = "".join(text for text, _ in self.pieces)
        return [
            f"first prompt ({self.prompt_id}), as the student's chat template renders it:",
            *(f"  | {_printable(line)}" for line in text.split("\n")),
            *(f"{name}: {_printable(value)}" for name, value in self.facts()),
            *self._teacher_lines(),
        ]

    def _teacher_lines(self) -> list[str]:
        if self.teacher_text is None:
            return []
        lines = self.teacher_text.split("\n")
        return ["the teacher reads instead:", *(f"  | {_printable(line)}" for line in lines)]


_THINKING = {
    "on": "on: the response may begin with a <think> block",
    "off": "off: the prompt ends with an empty <think> block",
    None: "not in this template",
}


def view_prompt(
    tokenizer: Any,
    prompt_id: str,
    token_ids: Sequence[int],
    *,
    template_arguments: Mapping[str, Any],
    eos_ids: Collection[int],
    teacher_ids: Sequence[int] | None = None,
) -> PromptView:
    """Describe a rendered prompt and what its template does."""
    pieces = _pieces(tokenizer, token_ids)
    return PromptView(
        prompt_id=prompt_id,
        pieces=pieces,
        num_tokens=len(token_ids),
        thinking=_thinking("".join(text for text, _ in pieces), template_of(tokenizer) or ""),
        end_of_turn=end_of_turn(tokenizer, template_arguments),
        end_tokens=tuple(name_token(tokenizer, token_id) for token_id in sorted(eos_ids)),
        teacher_text=None if teacher_ids is None else tokenizer.decode(list(teacher_ids)),
    )


def name_token(tokenizer: Any, token_id: int) -> NamedToken:
    """Return a token as the tokenizer spells it."""
    return NamedToken(token_id=token_id, text=tokenizer.decode([token_id]))


def end_of_turn(tokenizer: Any, template_arguments: Mapping[str, Any]) -> EndOfTurn | None:
    """Return what the template writes after an assistant's message.

    It renders a question with an answer and takes the text after the answer. None if there is no
    template, or if it renders no such conversation.
    """
    if template_of(tokenizer) is None:
        return None
    messages = [
        {"role": "user", "content": "What is 6 x 7?"},
        {"role": "assistant", "content": _CONTENT},
    ]
    try:
        text: str = apply_template(
            tokenizer, messages, tokenize=False, add_generation_prompt=False, **template_arguments
        )
    except (TemplateError, TypeError, ValueError):
        return None
    _, found, after = text.rpartition(_CONTENT)
    if not found:
        return None
    ids = tuple(tokenizer(after, add_special_tokens=False)["input_ids"])
    special = [token_id for token_id in ids if token_id in tokenizer.added_tokens_decoder]
    first = next(iter([*special, *ids]), None)
    token = None if first is None else name_token(tokenizer, first)
    return EndOfTurn(token_ids=ids, token=token)


def without_effect(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], template_arguments: Mapping[str, Any]
) -> list[str]:
    """Return the template arguments without which the messages render to the same text."""

    def text(arguments: Mapping[str, Any]) -> str | None:
        try:
            return apply_template(
                tokenizer, messages, tokenize=False, add_generation_prompt=True, **arguments
            )
        except (TemplateError, TypeError, ValueError):  # it needs what was left out
            return None

    whole = text(template_arguments)
    return [
        name
        for name in template_arguments
        if text({key: value for key, value in template_arguments.items() if key != name}) == whole
    ]


def _pieces(tokenizer: Any, token_ids: Sequence[int]) -> tuple[tuple[str, int | None], ...]:
    """Decode token ids, with each added token (special ones, and e.g. ``<think>``) by itself."""
    added = tokenizer.added_tokens_decoder
    pieces: list[tuple[str, int | None]] = []
    plain: list[int] = []
    for token_id in [*token_ids, None]:
        if token_id is not None and token_id not in added:
            plain.append(token_id)
            continue
        if plain:
            pieces.append((tokenizer.decode(plain), None))
            plain = []
        if token_id is not None:
            pieces.append((tokenizer.decode([token_id]), token_id))
    return tuple(pieces)


def _printable(line: str) -> str:
    """Write characters that a terminal would obey, or not show, by their numbers."""
    return "".join(c if c.isprintable() or c == "\t" else f"\\u{{{ord(c):x}}}" for c in line)


def _thinking(prompt: str, template: str) -> Thinking | None:
    """Return whether a response to the prompt thinks, as far as the template tells."""
    before, closed, after = prompt.rpartition(_CLOSE)
    if closed and not after.strip() and not before.rpartition(_OPEN)[2].strip():
        return "off"
    if prompt.rstrip().endswith(_OPEN) or "enable_thinking" in (arguments_read(template) or {}):
        return "on"
    return None
