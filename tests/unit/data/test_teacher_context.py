"""A teacher's context: its messages, the row's fields in them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from qwen3_distill.config import ContextConfig, JsonlPrompts, ParquetPrompts, TaskPrompts
from qwen3_distill.data import rendering
from qwen3_distill.data.prompts import PromptStream, PromptTooLong, render
from qwen3_distill.data.sources import FixedSource, Message, RawPrompt, build_source
from qwen3_distill.data.teacher_context import TeacherContext
from qwen3_distill.errors import DataError

ROW = {"hint": "carry the 1", "n": 3, "nothing": None, "parts": ["a", "b"], "items": "yes"}


def raw(*roles_and_texts: tuple[str, str], **fields: Any) -> RawPrompt:
    given: Any = roles_and_texts or [("system", "s"), ("user", "2+2?")]
    return RawPrompt(
        prompt_id="p.jsonl:7",
        messages=tuple(Message(role=role, content=text) for role, text in given),
        task_data={"answer": "4"},
        row={**ROW, **fields},
    )


def context(
    tokenizer: PreTrainedTokenizerFast, *, context_length: int = 1000, **settings: Any
) -> TeacherContext:
    config = ContextConfig.model_validate_json(json.dumps(settings))
    return TeacherContext(config, tokenizer, context_length=context_length)


def text(tokenizer: PreTrainedTokenizerFast, prompt: RawPrompt, **settings: Any) -> str:
    """Return the teacher's messages, a line each, without the generation prompt."""
    ids = context(tokenizer, **settings).ids(prompt, 10)
    whole: Any = tokenizer.decode(ids.tolist())
    assert whole.endswith("<|im_start|>assistant\n")
    turns = whole.removesuffix("<|im_start|>assistant\n").split("<|im_start|>")[1:]
    return " | ".join(turn.removesuffix("\n").removesuffix("<|im_end|>") for turn in turns)


# --- Messages -----------------------------------------------------------------------------------


def test_a_hint_and_the_answer_replace_the_last_user_message(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    settings = {"user": "{{ prompt }} ({{ row.hint }}, it is {{ answer }})"}
    told = text(tokenizer, raw(), **settings)
    assert told == "system\ns | user\n2+2? (carry the 1, it is 4)"
    turns = [("user", "1+1?"), ("assistant", "2"), ("user", "2+2?")]
    told = text(tokenizer, raw(*turns), **settings)
    assert told == "user\n1+1? | assistant\n2 | user\n2+2? (carry the 1, it is 4)"


def test_a_system_text_replaces_the_prompts_or_comes_first(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    settings = {"system": "{{ system }}!{% for part in row.parts %}{{ part }}{% endfor %}"}
    assert text(tokenizer, raw(), **settings) == "system\ns!ab | user\n2+2?"
    assert text(tokenizer, raw(("user", "2+2?")), **settings) == "system\n!ab | user\n2+2?"


def test_examples_stand_between_the_system_message_and_the_conversation(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    examples = [{"user": "1+{{ row.n }}?", "assistant": "4"}, {"user": "0?", "assistant": "0"}]
    expected = "system\ns | user\n1+3? | assistant\n4 | user\n0? | assistant\n0 | user\n2+2?"
    assert text(tokenizer, raw(), examples=examples) == expected


def test_a_context_that_says_the_same_has_the_prompts_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    prompt = render(raw(), tokenizer, 1000, 10, context=context(tokenizer, user="{{ prompt }}"))
    assert prompt.teacher_ids is not None
    assert prompt.teacher_ids.tolist() == prompt.token_ids.tolist()
    assert render(raw(), tokenizer, 1000, 10).teacher_ids is None


def test_optional_fields_may_be_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = {"user": "{{ prompt }}{% if row.note is defined %} {{ row.note }}{% endif %}"}
    assert text(tokenizer, raw(), **settings) == "system\ns | user\n2+2?"
    assert text(tokenizer, raw(note="n"), **settings) == "system\ns | user\n2+2? n"


def test_a_field_may_have_the_name_of_a_dicts_method(tokenizer: PreTrainedTokenizerFast) -> None:
    assert text(tokenizer, raw(), user="{{ row.items }}") == "system\ns | user\nyes"
    assert text(tokenizer, raw(), user='{{ row["items"] }}') == "system\ns | user\nyes"


# --- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ row.hnt }}", ["p.jsonl:7", "no field 'hnt'", "did you mean 'hint'", "'parts'"]),
        ("{{ row.hnt | upper }}", ["no field 'hnt'"]),
        ("{% if row.hnt %}x{% endif %}", ["no field 'hnt'"]),
        ("{{ row.parts.other }}", ["has no 'other'"]),
        ("{{ row.nothing }}", ["p.jsonl:7", "context.user", "is null"]),
        ("{{ row.parts }}", ["of type list", "tojson"]),
        ("{{ row.hint == 'x' }}", ["of type bool"]),
        ("  {% if false %}x{% endif %}", ["context.user", "empty text"]),
        ("{{ 1 // 0 }}", ["cannot be rendered", "ZeroDivisionError"]),
        ("{{ row.hint.__class__ }}", ["context.user"]),
        ("{{ row._fields }}", ["context.user"]),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", ["context.user"]),
    ],
)
def test_a_template_that_fails_names_the_row_and_the_field(
    tokenizer: PreTrainedTokenizerFast, template: str, words: list[str]
) -> None:
    with pytest.raises(DataError) as error:
        context(tokenizer, user=template).ids(raw(), 10)
    for word in words:
        assert word in str(error.value)


def test_a_row_without_an_answer_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = RawPrompt(prompt_id="p:0", messages=raw().messages)
    with pytest.raises(DataError, match=r"prompt p:0 .*no reference answer; set prompts.answer_fi"):
        context(tokenizer, user="{{ answer }}").ids(prompt, 10)


def test_half_of_a_character_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="half of a character"):
        context(tokenizer, user="{{ row.hint }}").ids(raw(hint="\ud800"), 10)


def test_a_template_without_an_end_is_stopped(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "PROBE_S", 3.0)
    loops = "{% for i in range(9999) %}" * 3 + "x" + "{% endfor %}" * 3
    with pytest.raises(DataError, match=r"scoring\.context\.user cannot be rendered .*not done"):
        context(tokenizer, user=loops).ids(raw(), 10)


def test_context_and_response_may_fill_the_teachers_context_but_not_exceed_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    size = context(tokenizer, user="{{ row.hint }}").ids(raw(), 10).size
    context(tokenizer, user="{{ row.hint }}", context_length=size + 10).ids(raw(), 10)
    with pytest.raises(PromptTooLong) as error:
        context(tokenizer, user="{{ row.hint }}", context_length=size + 9).ids(raw(), 10)
    for part in ("p.jsonl:7", f"reads {size} tokens", "tokens=10", f"context of {size + 9} tok"):
        assert part in str(error.value)


def test_too_long_contexts_are_dropped_and_counted_where_prompts_are(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    size = context(tokenizer, user="{{ row.hint }}").ids(raw(), 10).size
    short = context(tokenizer, user="{{ row.hint }}", context_length=size + 10)
    source = FixedSource([raw(), raw(hint="much longer than the other one"), raw()])
    stream = PromptStream(
        source, tokenizer, seed=0, context_length=1000, max_new_tokens=10, context=short
    )
    with pytest.raises(PromptTooLong):
        stream.check()
    stream.drop_too_long()
    assert (stream.num_dropped, stream.source.num_prompts) == (1, 2)
    assert f"the teacher's of {size + 10}" in stream.notes[0]


def test_a_message_that_the_chat_template_leaves_out_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    skips = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template, kept = skips, tokenizer.chat_template
    try:
        told = context(tokenizer, system="help")
        source = FixedSource([raw(("user", "2+2?"))])
        stream = PromptStream(
            source, tokenizer, seed=0, context_length=1000, max_new_tokens=10, context=told
        )
        with pytest.raises(DataError, match="the teacher's chat template leaves out message 0"):
            stream.check()
    finally:
        tokenizer.chat_template = kept


# --- Rows ---------------------------------------------------------------------------------------


def jsonl(path: Path, *rows: Any) -> JsonlPrompts:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return JsonlPrompts(kind="jsonl", path=str(path))


HINT = ContextConfig(user="{{ row.hint }}")


def test_rows_are_kept_for_a_context_only(tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "p.jsonl", {"prompt": "a", "hint": "h"})
    assert build_source(prompts).get(0).row == {}
    assert build_source(prompts, HINT).get(0).row["hint"] == "h"


def test_of_a_parquet_file_the_columns_of_the_context_are_read(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"], "hint": ["h"], "large": ["x"]})
    pq.write_table(table, tmp_path / "p.parquet")
    prompts = ParquetPrompts(kind="parquet", path=str(tmp_path / "p.parquet"))
    assert build_source(prompts, HINT).get(0).row == {"prompt": "a", "hint": "h"}
    any_field = ContextConfig(user="{% for name in row %}{{ row[name] }}{% endfor %}")
    assert set(build_source(prompts, any_field).get(0).row) == {"prompt", "hint", "large"}
    missing = ContextConfig(user="{{ row.hnt }}")
    with pytest.raises(DataError) as error:
        build_source(prompts, missing)
    for word in ("p.parquet", "'hnt'", "did you mean 'hint'", "'large'", "scoring.context"):
        assert word in str(error.value)


def test_a_tasks_row_has_problem_and_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = build_source(TaskPrompts(kind="task", limit=3), HINT).get(2)
    told = text(tokenizer, prompt, user="{{ row.problem }} {{ row.answer }}")
    assert told == f"user\n{prompt.messages[0].content} {prompt.task_data['answer']}"


def test_prompts_are_found_by_their_ids(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "hint": f"h{i}"} for i in range(5)]
    source = build_source(jsonl(tmp_path / "p.jsonl", *rows), HINT)
    told = context(tokenizer, user="{{ row.hint }}")
    stream = PromptStream(
        source, tokenizer, seed=3, context_length=1000, max_new_tokens=10, context=told
    )
    drawn = {prompt.prompt_id: prompt for prompt in stream.take(0, 5)}
    found = stream.find({"p.jsonl:3", "p.jsonl:0", "other:1"})
    assert set(found) == {"p.jsonl:3", "p.jsonl:0"}
    for name, prompt in found.items():
        assert prompt.token_ids.tolist() == drawn[name].token_ids.tolist()
        assert prompt.teacher_ids is not None
        assert f"h{name[-1]}" in tokenizer.decode(prompt.teacher_ids.tolist())
