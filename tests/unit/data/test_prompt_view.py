from typing import Any

import pytest

from qwen3_distill.data.prompt_view import (
    PromptView,
    Thinking,
    end_of_turn,
    view_prompt,
    without_effect,
)
from tests.tiny_models import byte_tokenizer

QWEN3 = (
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "2+2="}]


def view(tokenizer: Any, **arguments: object) -> PromptView:
    ids = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False, **arguments
    )
    return view_prompt(tokenizer, "p:0", ids, template_arguments=arguments, eos_ids={257, 256})


def test_the_prompt_is_shown_with_its_special_tokens_named() -> None:
    shown = view(byte_tokenizer())
    assert shown.pieces == (
        *(("<|user|>", 258), ("2+2=", None), ("<|end|>", 257), ("<|assistant|>", 259)),
    )
    text = "\n".join(shown.lines())
    for part in (
        *("first prompt (p:0)", "  | <|user|>2+2=<|end|><|assistant|>", "tokens: 7"),
        "special tokens: <|user|> (258) x 1, <|end|> (257) x 1, <|assistant|> (259) x 1",
        "thinking: not in this template",
        "the template ends an assistant's turn with: <|end|> (257)",
        "a rollout ends at: <|pad|> (256), <|end|> (257)",
    ):
        assert part in text


def test_what_a_terminal_would_obey_is_written_out() -> None:
    template = "{{ '\x1b[31m' }}\u202e{{ messages[0].content }}\n\tb"
    lines = view(byte_tokenizer(template)).lines()
    assert lines[1:3] == ["  | \\u{1b}[31m\\u{202e}2+2=", "  | \tb"]


@pytest.mark.parametrize(
    ("template", "arguments", "thinking"),
    [
        (QWEN3, {}, "on"),
        (QWEN3, {"enable_thinking": True}, "on"),
        (QWEN3, {"enable_thinking": False}, "off"),
        ("{{ messages[0].content }}<|assistant|><think>\n", {}, "on"),
        ("{{ messages[0].content }}<|assistant|><think></think>", {}, "off"),
        ("<think>because</think>{{ messages[0].content }}<|assistant|>", {}, None),
        ("{{ messages[0].content }}<|assistant|>", {}, None),
    ],
)
def test_it_says_whether_thinking_is_on(
    template: str, arguments: dict[str, bool], thinking: Thinking | None
) -> None:
    assert view(byte_tokenizer(template), **arguments).thinking == thinking


@pytest.mark.parametrize(
    ("after", "token", "ids"),
    [
        ("<|end|>", 257, (257,)),
        ("<|end|>\n", 257, (257, None)),
        ("\n<|pad|>", 256, (None, 256)),
        ("{{ eos_token }}", 257, (257,)),
        ("#", ord("#") - 33, (ord("#") - 33,)),
        ("", None, ()),
    ],
)
def test_the_end_of_an_assistants_turn(
    after: str, token: int | None, ids: tuple[int | None, ...]
) -> None:
    end = end_of_turn(
        byte_tokenizer("{% for m in messages %}{{ m.content }}" + after + "{% endfor %}"), {}
    )
    assert end is not None
    assert (end.token and end.token.token_id) == token
    assert len(end.token_ids) == len(ids)
    assert [a for a, b in zip(end.token_ids, ids, strict=True) if b not in (a, None)] == []


@pytest.mark.parametrize(
    "template",
    [None, "{{ raise_exception('no') }}", "{{ messages[0].content }}", "{{ nothing.here.at }}"],
)
def test_a_template_that_renders_no_assistant_has_no_end_of_turn(template: str | None) -> None:
    assert end_of_turn(byte_tokenizer(template), {}) is None


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"enable_thinking": False}, []),
        ({"enable_thinking": True}, ["enable_thinking"]),
        ({"other": 3, "enable_thinking": False}, ["other"]),
        ({}, []),
    ],
)
def test_arguments_that_change_nothing_are_found(
    arguments: dict[str, bool | int], names: list[str]
) -> None:
    assert without_effect(byte_tokenizer(QWEN3), MESSAGES, arguments) == names
