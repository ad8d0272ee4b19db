"""Numbers, keys and characters of configs, records and prompt files: read exactly, or refused."""

import json
import struct
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3_distill.config import JsonlPrompts, ParquetPrompts
from qwen3_distill.config.load import check_config, load_config, load_values
from qwen3_distill.data.sources import ANSWER_KEY, build_source
from qwen3_distill.data.sources.files import MAX_BLANK_LINES
from qwen3_distill.errors import ConfigError, DataError
from qwen3_distill.utils.json_text import parse_json

FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DEMO = Path(__file__).parents[3] / "configs" / "demo.yaml"


def jsonl_answer(folder: Path, number: str) -> str:
    file = folder / "p.jsonl"
    file.write_text(f'{{"prompt": "a", "answer": {number}}}\n')
    return first_answer(
        JsonlPrompts(kind="jsonl", path=str(file), prompt_field="prompt", answer_field="answer")
    )


def first_answer(config: Any) -> str:
    return build_source(config).get(0).task_data[ANSWER_KEY]


@FEW
@given(
    st.from_regex(r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,40})?([eE][-+]?[0-9]{1,3})?", fullmatch=True)
)
def test_a_number_of_a_file_keeps_its_value(tmp_path: Path, number: str) -> None:
    read = jsonl_answer(tmp_path, number)
    assert Decimal(read) == Decimal(number)
    assert "e" not in read.lower()


@pytest.mark.parametrize(
    "number", ["NaN", "-Infinity", "1e999999999", "1e-5000", "0." + "1" * 1300, "1e" + "9" * 30]
)
def test_a_number_that_is_no_answer_is_refused(tmp_path: Path, number: str) -> None:
    with pytest.raises(DataError, match="line 1"):
        jsonl_answer(tmp_path, number)


@FEW
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float32_answer_has_the_digits_of_a_float32(tmp_path: Path, value: float) -> None:
    columns = {"prompt": ["a"], "answer": pa.array([value], pa.float32())}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    config = ParquetPrompts(
        kind="parquet",
        path=str(tmp_path / "p.parquet"),
        prompt_field="prompt",
        answer_field="answer",
    )
    read = first_answer(config)
    assert np.float32(read) == np.float32(value)
    assert Decimal(read) == Decimal(str(np.float32(value)))


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "p.parquet")
    config = ParquetPrompts(kind="parquet", path=str(tmp_path / "p.parquet"), prompt_field="prompt")
    with pytest.raises(DataError, match="2 columns named 'prompt'"):
        build_source(config)


def test_blank_lines_without_an_end_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    config = JsonlPrompts(kind="jsonl", path=str(file), prompt_field="prompt")
    file.write_text('{"prompt": "a"}\n' + "\n" * MAX_BLANK_LINES)
    assert build_source(config).num_prompts == 1
    file.write_text('{"prompt": "a"}\n' + "\n" * (MAX_BLANK_LINES + 1))
    with pytest.raises(DataError, match="blank lines from line 2"):
        build_source(config)


@FEW
@given(st.dictionaries(st.text(max_size=5), st.integers(), min_size=1, max_size=5), st.data())
def test_a_key_twice_is_refused_at_any_depth(values: dict[str, int], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(values)))
    twice = json.dumps(values)[:-1] + f", {json.dumps(key)}: 1}}"
    for text in (twice, f'{{"a": [{twice}]}}'):
        with pytest.raises(ValueError, match="a key stands twice"):
            parse_json(text)
    assert parse_json(json.dumps(values)) == values


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}'])
def test_what_is_no_number_of_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of JSON"):
        parse_json(text)


@FEW
@given(st.integers(0xD800, 0xDFFF), st.sampled_from(["output_dir", "system", "environment"]))
def test_half_of_a_character_is_named_and_no_secret_is_shown(code: int, where: str) -> None:
    values = load_values(DEMO)
    values["generation"] = {"kind": "vllm", "environment": {"HF_TOKEN": "hf_s3cret"}}
    text = f"a{chr(code)}b"
    if where == "output_dir":
        values["output_dir"] = text
    elif where == "system":
        values["prompts"]["system"] = text
    else:
        values["generation"]["environment"]["X"] = text
    values = dict(reversed(values.items()))
    with pytest.raises(ConfigError, match="half of a character") as refused:
        check_config(values)
    assert where in str(refused.value)
    assert "s3cret" not in str(refused.value)


def test_both_halves_are_a_character(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps(load_values(DEMO) | {"output_dir": "runs/\U0001f600"}))
    assert load_config(file).output_dir == "runs/\U0001f600"


@pytest.mark.parametrize("path", ["/dev/zero", "a\0b"])
def test_a_config_file_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"more than|cannot be read"):
        load_config(path)


def test_a_config_file_of_any_size_is_read_in_part(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2) + b"{}" + b"\0" * (8 << 20))
    with pytest.raises(ConfigError, match="check that it is a config"):
        load_config(file)
