"""Odd configs, prompt files and records are refused with a cause, or read as what they say.

The kinds of `benchmarks/robustness/fuzz` with small counts; `make fuzz` runs them with large ones.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.robustness.fuzz import configs, model_dirs, prompt_files
from qwen3_distill.config.yaml12 import MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES, parse_yaml
from qwen3_distill.data.rendering import TemplateFault, apply_template
from qwen3_distill.errors import ConfigError, DataError, ModelError
from qwen3_distill.modeling.digest import directory_digest
from qwen3_distill.modeling.directory import check_model_dir
from qwen3_distill.modeling.known_answer import layerwise_logprobs
from qwen3_distill.modeling.loading import load_model, load_tokenizer
from qwen3_distill.recording.records import read_evaluations, read_steps, read_summary
from qwen3_distill.recording.trace_events import check_events
from qwen3_distill.utils.json_text import parse_json
from qwen3_distill.utils.shown import shortened, shown
from tests.tiny_models import byte_tokenizer, write_model

FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


@pytest.mark.parametrize("kind", [configs, prompt_files])
def test_a_few_of_each_kind_are_no_failures(kind: Any) -> None:
    counts = kind.run(seed=random.Random().randrange(10**6), count=60)
    assert counts.tried == 60
    assert counts.failures == 0, counts.examples


def test_a_few_model_directories_are_no_failures() -> None:
    counts = model_dirs.run(seed=3, count=13)
    assert counts.failures == 0, counts.examples


@FEW
@given(st.text(max_size=300) | st.text(alphabet="[]{}:,-?&*!|>'\"#%@ \n\tab1.", max_size=120))
def test_any_text_is_yaml_or_refused(text: str) -> None:
    value = message = None
    try:
        value = parse_yaml(text, "f")
    except ConfigError as error:
        message = str(error)
    assert len(message or "") < 1000
    assert_of_json(value)


def assert_of_json(value: Any) -> None:
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        for inner in value.values():
            assert_of_json(inner)
    elif isinstance(value, list):
        for inner in value:
            assert_of_json(inner)
    else:
        assert value is None or type(value) in (str, int, float, bool)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!int", "no value for the tag"),
        ("a: !!float", "no value for the tag"),
        ("a: !!bool maybe", "no value for the tag"),
        ("a: !!null x", "no value for the tag"),
        ("a: !!timestamp 2024-01-01", "no type of a setting"),
        ("a: !!python/name:os.system x", "no type of a setting"),
        ('a: "\\UFFFFFFFF"', "too large"),
        ("[" * (MAX_DEPTH + 1), "nested deeper than"),
        ("- " * (MAX_DEPTH + 1) + "a", "nested deeper than"),
        ("a: &a [*a]", "inside of its anchor"),
        ("a: &a {b: {c: *a}}", "inside of its anchor"),
        ("a: " + " " * MAX_CHARACTERS, "characters, more than"),
        ("a: [" + "1," * MAX_VALUES + "]", "more than 20,000 values"),
        ("x: " + "'" + "b" * 20_000, "characters left out|scalar"),
    ],
)
def test_what_no_config_holds_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        parse_yaml(text, "f.yaml")
    assert str(refused.value).startswith("f.yaml: ")
    assert len(str(refused.value)) < 1000


def test_aliases_of_aliases_are_counted() -> None:
    lines = ["x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 10)]
    with pytest.raises(ConfigError, match="aliases included"):
        parse_yaml("\n".join(lines), "f")
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]", "f") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


@FEW
@given(JSON)
def test_a_record_of_any_form_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "wall_s": 2.0, "tokens/generated": 3, "tokens/trained": 3}\n'
    file.write_text(whole + json.dumps(value) + "\n")
    for read in (read_steps, read_evaluations):
        with pytest.raises(DataError, match=r"metrics\.jsonl"):
            read(file)
    file.write_text(json.dumps(value))
    with pytest.raises(DataError, match="is no summary"):
        read_summary(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", True),
        ("step", 1),
        ("step", -1),
        ("step", 2.0),
        ("wall_s", "2"),
        ("wall_s", None),
        ("wall_s", -1),
        ("tokens/generated", 1.5),
        ("loss/objective", "0.5"),
        ("loss/objective", [1]),
        ("loss/objective", 10**400),
        ("time/train_s", -3.0),
        ("any/key", False),
    ],
)
def test_a_step_with_one_wrong_field_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    file = tmp_path / "metrics.jsonl"
    first = {"step": 1, "wall_s": 2.0, "tokens/generated": 3, "tokens/trained": 3}
    second = first | {"step": 2, "loss/objective": None}
    file.write_text("".join(json.dumps(record) + "\n" for record in (first, second)))
    assert len(read_steps(file)) == 2
    second[key] = value
    file.write_text("".join(json.dumps(record) + "\n" for record in (first, second)))
    with pytest.raises(DataError, match="record 2"):
        read_steps(file)


@FEW
@given(JSON)
def test_an_event_of_any_form_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"trace\.json: event 1"):
        check_events([value if isinstance(value, dict) else {"ph": value}], "trace.json")


@FEW
@given(st.binary(max_size=200) | st.builds(lambda n: b"[" * n, st.integers(1, 200_000)))
def test_json_of_any_form_fails_in_one_way(content: bytes) -> None:
    message = ""
    try:
        parse_json(content)
    except ValueError as error:
        message = str(error)
    assert len(message) < 400


def test_what_is_shown_is_short() -> None:
    for value in ("x" * 10**6, [[1] * 1000] * 1000, {str(n): n for n in range(10**4)}, 10**4000):
        assert len(shown(value)) < 500
    assert shown("a\x1b[31m") == repr("a\x1b[31m")
    assert shortened("abc", 10) == "abc"
    assert len(shortened("x" * 10**5, 100)) < 200


def test_an_evaluation_without_its_time_is_refused_where_that_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "evaluations.jsonl"
    shares = {"accuracy": 0.5, "ci_low": 0.4, "ci_high": 0.6}
    file.write_text(json.dumps({"step": 0, "model": "teacher", "num_problems": 3, **shares}))
    assert len(read_evaluations(file, complete=False)) == 1
    with pytest.raises(DataError, match="wall_s is missing"):
        read_evaluations(file)


# --- Model directories ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", None, ["fp8"]])
def test_a_quantized_model_says_what_to_use(tmp_path: Path, method: Any) -> None:
    model = write_model(tmp_path / "model", seed=0)
    change(model / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match=r"unquantized model.*FP8 checkpoint"):
        check_model_dir(model)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/x.safetensors", "x/y.safetensors", "", 7, None]
)
def test_an_index_names_files_of_its_directory_only(tmp_path: Path, name: Any) -> None:
    model, other = (write_model(tmp_path / each, seed=0) for each in ("model", "other"))
    assert other.is_dir()
    (model / "model.safetensors").rename(model / "part.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ModelError, match="in its own directory"):
        check_model_dir(model)


def test_the_digest_is_over_what_the_index_names(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", seed=0)
    (model / "model.safetensors").rename(model / "part.safetensors")
    index = {"weight_map": {"model.norm.weight": "part.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    before = directory_digest(model)
    (model / "stray.safetensors").write_bytes(b"of another model")
    assert directory_digest(model) == before
    content = bytearray((model / "part.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "part.safetensors").write_bytes(bytes(content))
    assert directory_digest(model) != before


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_from_the_hub_is_refused(tmp_path: Path, key: str) -> None:
    model = write_model(tmp_path / "model", seed=0)
    change(model / "config.json", **{key: "sdpa"})
    check_model_dir(model)
    change(model / "config.json", **{key: "kernels-community/flash-attn"})
    with pytest.raises(ModelError, match="code from elsewhere"):
        check_model_dir(model)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_a_directory_asks_for_is_not_used(tmp_path: Path, key: str) -> None:
    """`flash_attention_2` of a config once ended in transformers' ImportError."""
    model = write_model(tmp_path / "model", seed=0)
    plain = layerwise_logprobs(model, np.arange(9, dtype=np.int32))
    change(model / "config.json", **{key: "flash_attention_2"})
    loaded = load_model(model, device=torch.device("cpu"), dtype=torch.float32)
    assert loaded.config._attn_implementation == "sdpa"
    assert np.array_equal(layerwise_logprobs(model, np.arange(9, dtype=np.int32)), plain)


def test_a_tokenizer_that_cannot_be_used_is_found_when_it_is_loaded(tmp_path: Path) -> None:
    """A limit that is text once gave a TypeError at the first text."""
    model = write_model(tmp_path / "model", seed=0)
    change(model / "tokenizer_config.json", model_max_length="4096")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(model)


def test_a_config_that_no_model_can_be_made_of_is_refused(tmp_path: Path) -> None:
    """An unknown kind of rotary embedding once gave a KeyError in the known answer."""
    model = write_model(tmp_path / "model", seed=0)
    change(model / "config.json", rope_parameters={"rope_type": "'", "rope_theta": 10000.0})
    with pytest.raises(ModelError, match="its model cannot be computed: KeyError"):
        layerwise_logprobs(model, np.arange(9, dtype=np.int32))


# --- Chat templates -------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ 'x' * 10 ** 11 }}", "takes more than 2 GiB"),
    ],
)
def test_what_a_template_does_is_its_fault(template: str, cause: str) -> None:
    with pytest.raises(TemplateFault, match=cause):
        apply_template(byte_tokenizer(template), MESSAGES, tokenize=False)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",  # while it is compiled, without a way to interrupt it
    ],
)
def test_a_template_that_does_not_end_is_ended(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3_distill.data.rendering.PROBE_S", 2.0)
    with pytest.raises(TemplateFault, match="not done after 2 s"):
        apply_template(byte_tokenizer(template), MESSAGES, tokenize=False)


def test_a_template_that_ends_for_one_prompt_only_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = byte_tokenizer(
        "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999)"
        " %}{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}"
    )
    assert apply_template(tokenizer, MESSAGES, tokenize=False) == "hello"
    monkeypatch.setattr("qwen3_distill.data.rendering.RENDER_S", 0.3)
    with pytest.raises(TemplateFault, match=r"not done after 0\.3 s"):
        apply_template(tokenizer, [{"role": "user", "content": "loop"}], tokenize=False)
    assert apply_template(tokenizer, MESSAGES, tokenize=False) == "hello"
