import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen3_distill.config import HuggingFacePrompts, JsonlPrompts, ParquetPrompts, TaskPrompts
from qwen3_distill.data.chain_task import ChainTask
from qwen3_distill.data.sources import FixedSource, Message, PromptSource, RawPrompt, build_source
from qwen3_distill.errors import DataError

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
]


def jsonl(path: Path, *rows: Any, **settings: Any) -> JsonlPrompts:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return JsonlPrompts(kind="jsonl", path=str(path), **settings)


def all_of(source: PromptSource) -> list[RawPrompt]:
    assert source.num_prompts is not None
    return [source.get(index) for index in range(source.num_prompts)]


# --- What a row becomes -------------------------------------------------------------------------


def test_plain_prompt_is_one_user_message(tmp_path: Path) -> None:
    source = build_source(jsonl(tmp_path / "p.jsonl", {"prompt": " two "}, {"prompt": "b", "x": 1}))
    assert all_of(source) == [
        RawPrompt(prompt_id="p.jsonl:0", messages=(Message(role="user", content=" two "),)),
        RawPrompt(prompt_id="p.jsonl:1", messages=(Message(role="user", content="b"),)),
    ]


def test_conversation_keeps_its_messages(tmp_path: Path) -> None:
    source = build_source(jsonl(tmp_path / "p.jsonl", {"prompt": CONVERSATION}))
    messages = source.get(0).messages
    assert [{"role": m.role, "content": m.content} for m in messages] == CONVERSATION


def test_system_comes_first_and_suffix_last(tmp_path: Path) -> None:
    config = jsonl(
        tmp_path / "p.jsonl", {"prompt": CONVERSATION[1:]}, system="Think.", suffix="\nBox it."
    )
    messages = build_source(config).get(0).messages
    assert messages[0] == Message(role="system", content="Think.")
    assert [m.content for m in messages[1:]] == ["2+2?", "4", "3+3?\nBox it."]


def test_two_system_messages_are_refused(tmp_path: Path) -> None:
    config = jsonl(tmp_path / "p.jsonl", {"prompt": CONVERSATION}, system="Think.")
    with pytest.raises(DataError, match=r"line 1 brings a system message"):
        build_source(config)


@pytest.mark.parametrize(("answer", "text"), [("#### 4", "#### 4"), (4, "4"), (-7, "-7")])
def test_answer_field_goes_into_task_data(tmp_path: Path, answer: Any, text: str) -> None:
    row = {"question": "2+2?", "solution": answer}
    config = jsonl(tmp_path / "p.jsonl", row, prompt_field="question", answer_field="solution")
    assert build_source(config).get(0).task_data == {"answer": text}


def test_limit_reads_the_first_rows_only(tmp_path: Path) -> None:
    config = jsonl(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"bad": 1}, limit=2)
    assert [raw.prompt_id for raw in all_of(build_source(config))] == ["p.jsonl:0", "p.jsonl:1"]


def test_gsm8k_as_it_is_published(gsm8k_sample: Path) -> None:
    config = JsonlPrompts(
        kind="jsonl", path=str(gsm8k_sample), prompt_field="question", answer_field="answer"
    )
    prompts = all_of(build_source(config))
    assert len(prompts) == 40
    assert prompts[17].prompt_id == "gsm8k_sample.jsonl:17"
    assert prompts[0].messages[0].content.startswith("Natalia sold clips")
    assert prompts[0].task_data["answer"].endswith("#### 72")


@pytest.mark.parametrize("index", [-1, 2])
def test_index_outside_is_an_index_error(tmp_path: Path, index: int) -> None:
    source = build_source(jsonl(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"}))
    with pytest.raises(IndexError, match="source with 2 prompts"):
        source.get(index)


def test_fixed_source_needs_a_prompt() -> None:
    with pytest.raises(DataError, match="no prompts"):
        FixedSource([])


# --- JSONL errors -------------------------------------------------------------------------------

GOOD = b'{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.jsonl has no rows"),
        (b"\n\n", r"bad\.jsonl has no rows"),
        (GOOD + b"{'prompt': 1}\n", r"bad\.jsonl, line 2 is not valid JSON .*column 2"),
        (GOOD + b'["a"]\n', r"line 2 is a JSON list, expected an object"),
        (GOOD + b'{"prompt": "a", "prompt": "b"}\n', r"line 2 .*a key stands twice .*'prompt'"),
        (GOOD + b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}\n", r"line 2 cannot be read as JSON"),
        (GOOD + b"[" * 200_000 + b"\n", r"line 2 cannot be read as JSON"),
        (GOOD + b'{"prompt": "\\ud800"}\n', r"line 2 .*half of a character"),
        (GOOD + b"\n" + GOOD, r"line 2 is blank"),
        (GOOD + b'{"prompt": "\xff"}\n', r"line 2 is not UTF-8"),
        (GOOD + b'{"promt": "a"}\n', r"line 2 has no field 'prompt' \(did you mean 'promt'\?\)"),
        (b'{"q": "a", "z": 1}\n', r"its fields are \['q', 'z'\]\. Change prompts\.prompt_field"),
        (b'{"prompt": 3}\n', r"line 1, field 'prompt' is of type int, expected a string or a list"),
        (b'{"prompt": null}\n', r"line 1, field 'prompt' is of type NoneType"),
        (b'{"prompt": " "}\n', r"line 1, field 'prompt' is an empty prompt"),
        (b'{"prompt": []}\n', r"line 1, field 'prompt' is an empty prompt"),
        (b'{"prompt": ["a"]}\n', r"message 0 is of type str, expected an object"),
        (b'{"prompt": [{"role": "user"}]}\n', r"message 0 has the keys \['role'\]"),
        (
            b'{"prompt": [{"role": "user", "content": "a", "name": "b"}]}\n',
            r"message 0 has the keys \['content', 'name', 'role'\]",
        ),
        (b'{"prompt": [{"role": "human", "content": "a"}]}\n', r"role 'human', expected one of"),
        (b'{"prompt": [{"role": "user", "content": ["a"]}]}\n', r"content of type list"),
        (
            b'{"prompt": [{"role": "assistant", "content": "a"}]}\n',
            r"ends with a message of role 'assistant', expected .* the user's",
        ),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_source(JsonlPrompts(kind="jsonl", path=str(path)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"line 1 has no field 'answer'.*Change prompts\.answer_field"),
        ({"prompt": "a", "answer": float("nan")}, r"field 'answer' is of type float \(nan\)"),
        ({"prompt": "a", "answer": float("inf")}, r"field 'answer' is of type float \(inf\)"),
        ({"prompt": "a", "answer": True}, r"field 'answer' is of type bool"),
        ({"prompt": "a", "answer": " "}, r"field 'answer' is empty"),
        ({"prompt": "a", "answer": "\ud800"}, r"field 'answer' holds .* half of a character"),
    ],
)
def test_bad_answers_are_refused(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_source(jsonl(tmp_path / "p.jsonl", row, answer_field="answer"))


def test_blank_lines_at_the_end_and_windows_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a"}\r\n{"prompt": "b\xe2\x80\xa8c"}\r\n\r\n\n')
    prompts = all_of(build_source(JsonlPrompts(kind="jsonl", path=str(path))))
    assert [raw.messages[0].content for raw in prompts] == ["a", "b\u2028c"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_missing_file_and_directory(tmp_path: Path, kind: Any) -> None:
    schema = {"jsonl": JsonlPrompts, "parquet": ParquetPrompts}[kind]
    with pytest.raises(DataError, match=r"nope does not exist.*change prompts\.path"):
        build_source(schema(kind=kind, path=str(tmp_path / "nope")))
    with pytest.raises(DataError, match="is a directory"):
        build_source(schema(kind=kind, path=str(tmp_path)))


# --- Parquet ------------------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict[str, Any]], **settings: Any) -> ParquetPrompts:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return ParquetPrompts(kind="parquet", path=str(path), **settings)


def test_parquet_gives_what_jsonl_gives(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": CONVERSATION, "answer": "6", "other": 1},
        {"prompt": [{"role": "user", "content": "hi"}], "answer": "7", "other": 2},
        {"prompt": CONVERSATION[1:], "answer": "8", "other": 3},
    ]
    settings = {"answer_field": "answer", "suffix": "!"}
    from_jsonl = all_of(build_source(jsonl(tmp_path / "p", *rows, **settings)))
    from_parquet = all_of(build_source(parquet(tmp_path / "p", rows, **settings)))
    assert from_parquet == from_jsonl
    assert len(from_parquet) == 3


def test_parquet_nulls_of_other_rows_keys_are_no_keys(tmp_path: Path) -> None:
    struct = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    messages = [[{"role": "user", "content": "a", "name": None}]]
    table = pa.table({"prompt": pa.array(messages, pa.list_(struct))})
    pq.write_table(table, tmp_path / "p.parquet")
    source = build_source(ParquetPrompts(kind="parquet", path=str(tmp_path / "p.parquet")))
    assert source.get(0).messages == (Message(role="user", content="a"),)


def test_parquet_errors(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with pytest.raises(
        DataError, match=r"p\.parquet has no field 'prompt' \(did you mean 'prompts"
    ):
        build_source(parquet(path, [{"prompts": "a"}]))
    with pytest.raises(DataError, match=r"p\.parquet, row 1, field 'prompt' is of type NoneType"):
        build_source(parquet(path, [{"prompt": "a"}, {"prompt": None}]))
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"p\.parquet cannot be read as Parquet"):
        build_source(ParquetPrompts(kind="parquet", path=str(path)))


# --- Hugging Face datasets ----------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_directory_of_data_files(tmp_path: Path, datasets: Any) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    jsonl(folder / "train.jsonl", {"q": "a", "a": "1"}, {"q": "b", "a": "2"}, {"q": "c", "a": "3"})
    config = HuggingFacePrompts(
        kind="hf", path=str(folder), prompt_field="q", answer_field="a", limit=2
    )
    prompts = all_of(build_source(config))
    assert [raw.prompt_id for raw in prompts] == ["mine/train:0", "mine/train:1"]
    assert prompts[1].messages == (Message(role="user", content="b"),)
    assert prompts[1].task_data == {"answer": "2"}
    with pytest.raises(DataError, match=r"mine/test cannot be loaded .*split"):
        build_source(HuggingFacePrompts(kind="hf", path=str(folder), split="test"))


def test_directory_by_save_to_disk(tmp_path: Path, datasets: Any) -> None:
    one = datasets.Dataset.from_list([{"prompt": CONVERSATION}])
    one.save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict(
        {"train": one, "test": datasets.Dataset.from_list([{"prompt": "t"}])}
    )
    both.save_to_disk(tmp_path / "both")
    source = build_source(HuggingFacePrompts(kind="hf", path=str(tmp_path / "one")))
    assert [m.content for m in source.get(0).messages] == ["Be brief.", "2+2?", "4", "3+3?"]
    source = build_source(HuggingFacePrompts(kind="hf", path=str(tmp_path / "both"), split="test"))
    assert source.get(0).prompt_id == "both/test:0"
    with pytest.raises(DataError, match=r"has the splits \['test', 'train'\], not 'dev'"):
        build_source(HuggingFacePrompts(kind="hf", path=str(tmp_path / "both"), split="dev"))
    with pytest.raises(DataError, match=r"neither configurations nor revisions"):
        build_source(HuggingFacePrompts(kind="hf", path=str(tmp_path / "one"), revision="abc"))


def test_hub_id_with_configuration_and_revision(datasets: Any, monkeypatch: Any) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = HuggingFacePrompts(
        kind="hf", path="openai/gsm8k", name="main", revision="abc", prompt_field="question"
    )
    assert build_source(config).get(0).prompt_id == "openai/gsm8k@abc/main/train:0"
    assert asked == [(("openai/gsm8k", "main"), {"split": "train", "revision": "abc"})]
    with pytest.raises(DataError, match=r"openai/gsm8k@abc/main/train has no field 'prompt'"):
        build_source(config.model_copy(update={"prompt_field": "prompt"}))


def test_unreachable_hub_is_a_data_error(datasets: Any, monkeypatch: Any) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"a/b/train cannot be loaded \(no network\)"):
        build_source(HuggingFacePrompts(kind="hf", path="a/b"))


# --- The procedural task ------------------------------------------------------------------------


def test_task_is_endless_and_gives_the_tasks_problems() -> None:
    source = build_source(TaskPrompts(kind="task", split="eval"))
    problem = ChainTask().problem("eval", 10**6)
    raw = source.get(10**6)
    assert source.num_prompts is None
    assert raw.prompt_id == problem.problem_id
    assert raw.messages == (Message(role="user", content=problem.text),)
    assert raw.task_data == {"problem": problem.text, "answer": problem.answer}


def test_task_with_a_limit() -> None:
    source = build_source(TaskPrompts(kind="task", limit=3))
    assert source.num_prompts == 3
    with pytest.raises(IndexError):
        source.get(3)
    with pytest.raises(IndexError):
        build_source(TaskPrompts(kind="task")).get(-1)
