from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qwen3_distill.config import TaskPrompts
from qwen3_distill.data.prompts import PromptStream, epoch_permutation, render
from qwen3_distill.data.sources import FixedSource, Message, PromptSource, RawPrompt, build_source
from qwen3_distill.errors import DataError


def raw_prompt(content: str, prompt_id: str = "p:0") -> RawPrompt:
    messages = (Message(role="system", content="s"), Message(role="user", content=content))
    return RawPrompt(prompt_id=prompt_id, messages=messages, task_data={"answer": "4"})


def source_of(size: int) -> FixedSource:
    return FixedSource([raw_prompt(str(i), f"p:{i}") for i in range(size)])


class CountingTokenizer:
    """Stands in where tokens do not matter."""

    chat_template = "x"

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> list[int]:
        return [len(conversation)]


def stream(source: PromptSource, seed: int = 0) -> PromptStream:
    return PromptStream(
        source, CountingTokenizer(), seed=seed, context_length=100, max_new_tokens=10
    )


def ids(stream: PromptStream, start: int, count: int) -> list[str]:
    return [prompt.prompt_id for prompt in stream.take(start, count)]


# --- Rendering ----------------------------------------------------------------------------------


def test_render_follows_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = render(raw_prompt("2+2?"), tokenizer, context_length=1000, max_new_tokens=10)
    text = (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(prompt.token_ids.tolist()) == text
    assert prompt.token_ids.dtype == np.int32
    assert prompt.prompt_id == "p:0"
    assert prompt.task_data == {"answer": "4"}


def test_prompt_and_answer_may_fill_the_context_but_not_exceed_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    size = render(raw_prompt("a"), tokenizer, 1000, 1).token_ids.size
    render(raw_prompt("a"), tokenizer, context_length=size + 7, max_new_tokens=7)
    with pytest.raises(DataError) as error:
        render(raw_prompt("a"), tokenizer, context_length=size + 6, max_new_tokens=7)
    for part in ("p:0", f"{size} tokens", "max_new_tokens=7", f"context of {size + 6} tokens"):
        assert part in str(error.value)


def test_tokenizer_without_a_chat_template(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="no chat template"):
        render(raw_prompt("a"), tokenizer, 1000, 10)


def test_an_argument_that_is_of_another_type_is_a_data_error(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(DataError, match=r"prompt p:0 .*template_arguments=\{'tools': 3\}"):
        render(raw_prompt("a"), tokenizer, 1000, 10, {"tools": 3})


def test_template_that_refuses_the_messages(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match=r"prompt p:0: .*\['system', 'user'\] \(no system role\)"):
        render(raw_prompt("a"), tokenizer, 1000, 10)


# --- The stream ---------------------------------------------------------------------------------


@given(size=st.integers(1, 40), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_every_prompt_exactly_once_per_epoch(size: int, seed: int, epoch: int) -> None:
    drawn = ids(stream(source_of(size), seed), epoch * size, size)
    assert sorted(drawn) == sorted(f"p:{i}" for i in range(size))


@given(
    size=st.integers(1, 12), cuts=st.lists(st.integers(0, 9), max_size=6), start=st.integers(0, 30)
)
def test_any_split_of_the_stream_gives_the_same_prompts(
    size: int, cuts: list[int], start: int
) -> None:
    whole = ids(stream(source_of(size)), start, sum(cuts))
    resumable, position, pieces = stream(source_of(size)), start, []
    for count in cuts:
        pieces += ids(resumable, position, count)
        # A stream made anew at a position goes on as the old one would have.
        assert pieces[len(pieces) - count :] == ids(stream(source_of(size)), position, count)
        position += count
    assert pieces == whole


def test_going_back_gives_the_same_prompts() -> None:
    one = stream(source_of(10))
    first = ids(one, 0, 30)
    assert ids(one, 0, 30) == first


def test_order_changes_with_epoch_and_seed() -> None:
    one = stream(source_of(50))
    orders = [ids(one, 0, 50), ids(one, 50, 50), ids(stream(source_of(50), seed=1), 0, 50)]
    in_file_order = [f"p:{i}" for i in range(50)]
    assert len({tuple(order) for order in [*orders, in_file_order]}) == 4


def test_order_is_pinned() -> None:
    # A change here makes old runs draw other prompts after a resume.
    assert epoch_permutation(0, 0, 8).tolist() == [6, 0, 2, 5, 4, 1, 7, 3]
    assert epoch_permutation(7, 3, 8).tolist() == [3, 4, 0, 6, 1, 2, 5, 7]


def test_endless_task_is_taken_in_its_own_order() -> None:
    source = build_source(TaskPrompts(kind="task"))
    expected = [source.get(i).prompt_id for i in range(5, 9)]
    assert ids(stream(source, seed=3), 5, 4) == expected


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, -1)])
def test_negative_positions_are_refused(start: int, count: int) -> None:
    with pytest.raises(ValueError, match="expected both >= 0"):
        stream(source_of(3)).take(start, count)


# --- Prompts that are too long, and roles that a template does not know -------------------------


def texts(*contents: str) -> FixedSource:
    return FixedSource([raw_prompt(text, f"p:{i}") for i, text in enumerate(contents)])


def test_prompts_that_are_too_long_are_dropped_and_counted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    size = render(raw_prompt("a"), tokenizer, 1000, 1).token_ids.size

    def stream_of(source: FixedSource) -> PromptStream:
        return PromptStream(source, tokenizer, seed=0, context_length=size + 8, max_new_tokens=7)

    mixed = stream_of(texts("a", "b" * 9, "c", "d" * 3))
    with pytest.raises(DataError, match=r"prompt p:1 .*prompts\.too_long=drop"):
        mixed.check()
    mixed.drop_too_long()
    mixed.check()
    assert sorted(ids(mixed, 0, 2)) == ["p:0", "p:2"]
    assert mixed.num_dropped == 2
    assert mixed.notes == (
        f"2 of 4 prompts do not fit the context of {size + 8} tokens with max_new_tokens=7 and "
        "are left out, e.g. p:1",
    )
    short = stream_of(texts("a", "b"))
    short.drop_too_long()
    assert (short.num_dropped, short.notes) == (0, ())
    with pytest.raises(DataError, match=r"2 of 2 prompts do not fit .*none is left"):
        stream_of(texts("a" * 9, "b" * 9)).drop_too_long()


QWEN_LIKE = (
    "{% for m in messages %}{% if m.role in ('user', 'system', 'assistant') %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("role", ["developer", "tool", "system", "user"])
def test_role_that_the_template_leaves_out_is_refused(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, role: Any
) -> None:
    messages = (Message(role=role, content="x"), Message(role="user", content="y"))
    source = FixedSource([RawPrompt(prompt_id="p:0", messages=messages)])

    def check() -> None:
        PromptStream(source, tokenizer, seed=0, context_length=999, max_new_tokens=1).check()

    check()  # the fixture's template knows every role
    monkeypatch.setattr(tokenizer, "chat_template", QWEN_LIKE)
    if role in ("system", "user"):
        check()
        return
    with pytest.raises(DataError, match=rf"p:0 .*leaves out message 0 of role '{role}'"):
        check()
