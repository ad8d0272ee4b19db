"""Tags of prompts, and the order in which a run draws tagged prompts."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.config import JsonlPrompts, ParquetPrompts
from qwen3_distill.config.data import Tagging
from qwen3_distill.data.prompts import PromptStream
from qwen3_distill.data.sources import build_source
from qwen3_distill.data.tags import TagSchedule, tag_of
from qwen3_distill.errors import DataError
from tests.tiny_models import byte_tokenizer

TAGGING = Tagging("task", ("math", "code"))
ROWS = [{"prompt": f"p{n}", "task": "code" if n % 4 == 3 else "math"} for n in range(12)]


def write(path: Path, rows: list[dict[str, Any]]) -> JsonlPrompts:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlPrompts(kind="jsonl", path=str(path))


def stream(config: JsonlPrompts, weights: dict[str, float] | None, seed: int = 3) -> PromptStream:
    return PromptStream(
        build_source(config),
        byte_tokenizer(),
        seed=seed,
        context_length=200,
        max_new_tokens=4,
        tag_weights=weights,
    )


@settings(max_examples=30, deadline=None)
@given(
    weights=st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 10), min_size=2),
    count=st.integers(1, 200),
)
def test_every_beginning_has_each_tags_share(weights: dict[str, float], count: int) -> None:
    schedule = TagSchedule(weights)
    places = [schedule.place(number) for number in range(count)]
    drawn = Counter(tag for tag, _ in places)
    for tag, weight in weights.items():
        share = weight / sum(weights.values()) * count
        assert abs(drawn[tag] - share) < len(weights) - 1 + 1e-9
        assert [n for t, n in places if t == tag] == list(range(drawn[tag]))


def test_the_order_follows_from_the_weights_alone() -> None:
    one = TagSchedule({"b": 1.0, "a": 2.0})
    other = TagSchedule({"a": 4.0, "b": 2.0})
    assert [one.place(n) for n in (40, 0, 7)] == [other.place(n) for n in (40, 0, 7)]


def test_a_weighted_stream_has_epochs_of_every_tag_and_is_found_by_number(tmp_path: Path) -> None:
    config = write(tmp_path / "p.jsonl", ROWS).tagged(TAGGING)
    weights = {"math": 1.0, "code": 1.0}
    taken = stream(config, weights).take(0, 36)
    tags = [tag_of(prompt) for prompt in taken]
    assert Counter(tags) == {"math": 18, "code": 18}
    for tag, size in (("math", 9), ("code", 3)):
        own = [p.prompt_id for p in taken if tag_of(p) == tag]
        epochs = [own[i : i + size] for i in range(0, 18, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    later = stream(config, weights).take(29, 5)
    assert [p.prompt_id for p in later] == [p.prompt_id for p in taken[29:34]]


def test_without_weights_the_order_is_that_of_untagged_prompts(tmp_path: Path) -> None:
    plain = write(tmp_path / "p.jsonl", ROWS)
    ids = [p.prompt_id for p in stream(plain, None).take(0, 30)]
    assert ids == [p.prompt_id for p in stream(plain.tagged(TAGGING), None).take(0, 30)]


def test_a_weighted_tag_without_rows_is_refused(tmp_path: Path) -> None:
    rows = [row for row in ROWS if row["task"] == "math"]
    config = write(tmp_path / "p.jsonl", rows).tagged(TAGGING)
    with pytest.raises(DataError, match="no prompt has the tag 'code'"):
        stream(config, {"math": 1.0, "code": 1.0}).check()


@pytest.mark.parametrize("value", ["physics", "", None, True, 1.5, ["math"], "Math", "math "])
def test_a_value_that_is_no_tag_is_refused(tmp_path: Path, value: Any) -> None:
    config = write(tmp_path / "p.jsonl", [*ROWS, {"prompt": "x", "task": value}]).tagged(TAGGING)
    with pytest.raises(DataError, match=r"line 13, field 'task' is .*expected one of math, code"):
        build_source(config)


def test_a_number_may_be_a_tag(tmp_path: Path) -> None:
    config = write(tmp_path / "p.jsonl", [{"prompt": "x", "task": 7}])
    raw = build_source(config.tagged(Tagging("task", ("7",)))).get(0)
    assert raw.task_data == {"teacher": "7"}


def test_parquet_reads_the_tags_column_and_names_it_where_it_lacks(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    config = ParquetPrompts(kind="parquet", path=str(tmp_path / "p.parquet"))
    source = build_source(config.tagged(TAGGING))
    assert [source.get(n).task_data["teacher"] for n in range(4)] == ["math"] * 3 + ["code"]
    with pytest.raises(DataError, match=r"has no field 'tag'.*Change scoring\.by"):
        build_source(config.tagged(Tagging("tag", ("math", "code"))))
