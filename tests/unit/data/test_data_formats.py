"""Rows of many forms are read: nested fields, conversations, compressed files, numbers."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen3_distill.config import HuggingFacePrompts, JsonlPrompts, ParquetPrompts
from qwen3_distill.data.sources import RawPrompt, build_source
from qwen3_distill.errors import DataError
from tests.hub_stand_in import running_hub

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "It is 4."}


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(path: Path, rows: list[Any], **settings: Any) -> list[RawPrompt]:
    path.write_bytes(lines(rows))
    source = build_source(JsonlPrompts(kind="jsonl", path=str(path), **settings))
    return [source.get(index) for index in range(source.num_prompts or 0)]


def turns(raw: RawPrompt) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in raw.messages]


# --- Fields -------------------------------------------------------------------------------------

VERL = {"prompt": [USER], "reward_model": {"ground_truth": "4", "style": "rule"}, "a.b": "7"}


@pytest.mark.parametrize(
    ("answer_field", "answer"),
    [
        ("reward_model.ground_truth", "4"),
        ("a.b", "7"),
        ("prompt.0.content", "2+2?"),
        ("prompt.-1.role", "user"),
    ],
)
def test_nested_fields(tmp_path: Path, answer_field: str, answer: str) -> None:
    (raw,) = read(tmp_path / "p.jsonl", [VERL], answer_field=answer_field)
    assert raw.task_data == {"answer": answer}
    pq.write_table(pa.Table.from_pylist([VERL]), tmp_path / "p.parquet")
    config = ParquetPrompts(
        kind="parquet", path=str(tmp_path / "p.parquet"), answer_field=answer_field
    )
    assert build_source(config).get(0).task_data == {"answer": answer}


@pytest.mark.parametrize(
    ("answer_field", "words"),
    [
        ("reward_model.groundtruth", ["field 'reward_model'", "did you mean 'ground_truth'"]),
        ("rewardmodel.ground_truth", ["has no field 'rewardmodel' (did you mean 'reward_model'?)"]),
        ("reward_model.ground_truth.x", ["of type str", "has no 'x'"]),
        ("prompt.1.content", ["of type list of 1", "has no '1'", "prompts.answer_field"]),
        ("prompt.x", ["of type list of 1", "has no 'x'"]),
    ],
)
def test_nested_fields_that_are_not_there(
    tmp_path: Path, answer_field: str, words: list[str]
) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path / "p.jsonl", [VERL], answer_field=answer_field)
    assert [word for word in ["line 1", *words] if word not in str(error.value)] == []


# --- Conversations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([USER, ANSWER], [("user", "2+2?")]),
        ([USER, ANSWER | {"reasoning_content": "hm"}], [("user", "2+2?")]),
        (
            [USER, ANSWER, USER | {"content": "3+3?"}, ANSWER],
            [("user", "2+2?"), ("assistant", "It is 4."), ("user", "3+3?")],
        ),
        (
            [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
            [("system", "s"), ("user", "q")],
        ),
        (
            [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            [("user", "q")],
        ),
        (
            [{"from": "user", "value": "q", "role": None}, {"from": "assistant", "value": "a"}],
            [("user", "q")],
        ),
        (
            [{"role": "developer", "content": "d"}, USER, {"role": "tool", "content": "4"}],
            [("developer", "d"), ("user", "2+2?"), ("tool", "4")],
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": t} for t in ("2+", "2?")]}],
            [("user", "2+2?")],
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": None}]}],
            [("user", "a")],
        ),
    ],
)
def test_conversations(tmp_path: Path, prompt: Any, expected: list[tuple[str, str]]) -> None:
    (raw,) = read(tmp_path / "p.jsonl", [{"messages": prompt}], prompt_field="messages")
    assert turns(raw) == expected


def test_final_assistant_turn_is_counted_and_may_be_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(lines([{"messages": [USER, ANSWER]}, {"messages": [USER]}]))
    settings: dict[str, Any] = {"kind": "jsonl", "path": str(path), "prompt_field": "messages"}
    source = build_source(JsonlPrompts(**settings))
    assert getattr(source, "notes", ()) == (
        "p.jsonl: 1 of 2 conversations end with an assistant turn, which is not part of the prompt",
    )
    settings |= {"answer_field": "messages.-1.content", "limit": 1}
    assert build_source(JsonlPrompts(**settings)).get(0).task_data == {"answer": "It is 4."}


def test_suffix_goes_to_the_last_user_message(tmp_path: Path) -> None:
    messages = [USER, {"role": "tool", "content": "4"}]
    (raw,) = read(tmp_path / "p.jsonl", [{"prompt": messages}], suffix="!")
    assert turns(raw) == [("user", "2+2?!"), ("tool", "4")]


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"from": "bot", "value": "x"}], r"message 0 is from 'bot', expected one of .*'human'"),
        ([{"from": "function_call", "value": "x"}], r"is from 'function_call'"),
        ([{"from": "human", "value": "q", "loss": 1}], r"keys \['from', 'loss', 'value'\]"),
        ([{"role": "user", "content": [IMAGE]}], r"part 0 is of type 'image_url'.*only text"),
        ([{"role": "user", "content": [IMAGE | {"text": "a"}]}], r"part 0 is of type 'image_url'"),
        ([{"role": "user", "content": ["a"]}], r"part 0 is of type 'str'"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], r"part 0 whose text is no"),
        ([{"role": "user", "content": []}], r"empty prompt"),
        ([ANSWER], r"ends with a message of role 'assistant'"),
        ([USER, ANSWER, ANSWER], r"ends with a message of role 'assistant'"),
        ([{"role": "system", "content": "s"}, ANSWER], r"ends with a message of role 'system'"),
        ([{"role": "tool", "content": "s"}], r"has no user message"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": []}, USER], r"tool_calls"),
    ],
)
def test_conversations_that_are_refused(tmp_path: Path, prompt: Any, message: str) -> None:
    with pytest.raises(DataError, match=r"p\.jsonl, line 2, .*" + message):
        read(tmp_path / "p.jsonl", [{"prompt": [USER]}, {"prompt": prompt}])


# --- Numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.0, "3"),
        (-3.0, "-3"),
        (-0.0, "0"),
        (0.5, "0.5"),
        (100.0, "100"),
        (0.1 + 0.2, "0.30000000000000004"),
        (1e-7, "0.0000001"),
        (1e22, "10000000000000000000000"),
        (3, "3"),
        ("3.0", "3.0"),
    ],
)
def test_numbers_as_answers(tmp_path: Path, value: Any, text: str) -> None:
    (raw,) = read(tmp_path / "p.jsonl", [{"prompt": "q", "answer": value}], answer_field="answer")
    assert raw.task_data == {"answer": text}


def test_decimals_as_answers(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["q"], "answer": pa.array([Decimal("3.50")])})
    pq.write_table(table, tmp_path / "p.parquet")
    path = str(tmp_path / "p.parquet")
    source = build_source(ParquetPrompts(kind="parquet", path=path, answer_field="answer"))
    assert source.get(0).task_data == {"answer": "3.5"}


# --- Compressed files ---------------------------------------------------------------------------


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstd)])
def test_compressed_files(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"p.jsonl.{suffix}"
    rows = [{"prompt": f"question {number}"} for number in range(5000)]
    whole = compress(lines(rows[:3000])) + compress(lines(rows[3000:]))  # as `cat` makes them
    path.write_bytes(whole)
    source = build_source(JsonlPrompts(kind="jsonl", path=str(path)))
    assert source.num_prompts == 5000
    assert source.get(4999).messages[0].content == "question 4999"
    assert source.get(4999).prompt_id == f"p.jsonl.{suffix}:4999"
    path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(DataError, match=r"cannot be decompressed .*expected a whole"):
        build_source(JsonlPrompts(kind="jsonl", path=str(path)))
    path.write_bytes(lines(rows))
    with pytest.raises(DataError, match=r"cannot be decompressed"):
        build_source(JsonlPrompts(kind="jsonl", path=str(path)))
    path.write_bytes(compress(lines([{"prompt": "a"}, {"prompt": 3}])))
    with pytest.raises(DataError, match=rf"p\.jsonl\.{suffix}, line 2, field 'prompt' is of type"):
        build_source(JsonlPrompts(kind="jsonl", path=str(path)))


# --- Datasets -----------------------------------------------------------------------------------


def test_dataset_with_nested_fields_and_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "r"}]},
    ]
    extra = [row | {"extra": {"answer": 4.0, "unit": "m"}} for row in rows]
    datasets.Dataset.from_list(extra).save_to_disk(tmp_path / "saved")
    config = HuggingFacePrompts(
        kind="hf",
        path=str(tmp_path / "saved"),
        prompt_field="conversations",
        answer_field="extra.answer",
    )
    source = build_source(config)
    assert [turns(source.get(i)) for i in range(2)] == [[("user", "q")], [("user", "r")]]
    assert source.get(1).task_data == {"answer": "4"}


def test_commit_of_a_dataset_is_loaded_and_not_part_of_its_name(monkeypatch: Any) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["revision"])
        return datasets.Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = HuggingFacePrompts(kind="hf", path="a/b", revision="v1")
    pinned = config.at_commit("c" * 40)
    assert build_source(pinned).get(0).prompt_id == build_source(config).get(0).prompt_id
    assert asked == ["c" * 40, "v1"]
    assert pinned.model_dump() == config.model_dump()


def test_dataset_by_hub_id_from_a_stand_in(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines([{"prompt": "a"}, {"prompt": "b"}]))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - split: test\n    path: a.jsonl\n---\n"
    )
    with running_hub() as hub:
        commit = hub.add("lab/data", folder, kind="datasets")
        program = (
            "from qwen3_distill.config import HuggingFacePrompts\n"
            "from qwen3_distill.data.sources import build_source\n"
            "config = HuggingFacePrompts(kind='hf', path='lab/data', name='main', split='test')\n"
            f"source = build_source(config.at_commit({commit!r}))\n"
            "print(source.num_prompts, source.get(1).prompt_id)\n"
        )
        # In a process of its own: `datasets` reads the hub's address when it is imported.
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout == "2 lab/data/main/test:1\n"


def test_errors_of_a_dataset_are_one_line(monkeypatch: Any) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("Config name is missing.\nPlease pick one among:\n['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"pick one among: \['main', 'socratic'\]") as error:
        build_source(HuggingFacePrompts(kind="hf", path="a/b"))
    assert "\n" not in str(error.value)
