"""A model's config is spelled for both generations of its readers, or refused."""

from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.errors import ModelError
from qwen3_distill.modeling.config_file import read_json_object, rope_parameters, spelled_for_both
from tests.tiny_models import write_model
from tests.unit.modeling.rope_as_transformers_reads import rope_of_directory, with_rope

FILE = Path("m/config.json")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LINEAR = {"rope_type": "linear", "factor": 2.0}
DEFAULT = {"rope_type": "default"}
MILLION = {"rope_theta": 1e6}

SPELLINGS: dict[str, tuple[dict[str, Any], dict[str, Any], float, dict[str, Any] | None]] = {
    # name: (config, rope_parameters, top-level rope_theta, rope_scaling)
    "old": ({**MILLION, "rope_scaling": None}, {**DEFAULT, **MILLION}, 1e6, None),
    "old, no scaling": (MILLION, {**DEFAULT, **MILLION}, 1e6, None),
    "old, empty scaling": ({**MILLION, "rope_scaling": {}}, {**DEFAULT, **MILLION}, 1e6, None),
    "old, integer": ({"rope_theta": 5000}, {**DEFAULT, "rope_theta": 5000}, 5000, None),
    "old, yarn": ({**MILLION, "rope_scaling": YARN}, {**YARN, **MILLION}, 1e6, YARN),
    "old, linear": ({**MILLION, "rope_scaling": LINEAR}, {**LINEAR, **MILLION}, 1e6, LINEAR),
    "oldest, type": (
        {**MILLION, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {**LINEAR, **MILLION},
        1e6,
        {"type": "linear", **LINEAR},
    ),
    "old, default named": (
        {**MILLION, "rope_scaling": DEFAULT},
        {**DEFAULT, **MILLION},
        1e6,
        DEFAULT,
    ),
    "new": ({"rope_parameters": {**DEFAULT, **MILLION}}, {**DEFAULT, **MILLION}, 1e6, None),
    "new, yarn": ({"rope_parameters": {**YARN, **MILLION}}, {**YARN, **MILLION}, 1e6, YARN),
    "new, null": ({"rope_parameters": None, **MILLION}, {**DEFAULT, **MILLION}, 1e6, None),
    "both": (
        {"rope_parameters": {**YARN, **MILLION}, **MILLION, "rope_scaling": YARN},
        {**YARN, **MILLION},
        1e6,
        YARN,
    ),
    "neither": ({}, {**DEFAULT, "rope_theta": 1e4}, 1e4, None),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_both(name: str) -> None:
    config, new, theta, scaling = SPELLINGS[name]
    assert rope_parameters(config, FILE) == new
    spelled = spelled_for_both(config, FILE, "bfloat16")
    assert spelled["rope_parameters"] == new
    assert spelled["rope_theta"] == theta
    assert spelled["rope_scaling"] == scaling
    assert spelled["dtype"] == spelled["torch_dtype"] == "bfloat16"
    assert spelled_for_both(spelled, FILE, "bfloat16") == spelled


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_library_reads_every_spelling_as_we_do(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", seed=0)
    config, new, _, _ = SPELLINGS[name]
    with_rope(model, config)
    assert rope_of_directory(model) == new
    with_rope(model, spelled_for_both(config, FILE, "float32"))
    assert rope_of_directory(model) == new


def test_other_keys_keep_value_and_order() -> None:
    config = {
        "vocab_size": 3,
        "mine": {"deep": [1, None, "ü"]},
        "torch_dtype": "float32",
        "layer_types": ["full_attention"],
        "tie_word_embeddings": True,
        "transformers_version": "4.51.0",
        "auto_map": {"AutoModel": "mine.Model"},
    }
    spelled = spelled_for_both(config, FILE, "bfloat16")
    assert list(spelled)[: len(config)] == list(config)
    assert {key: spelled[key] for key in config} == config | {"torch_dtype": "bfloat16"}
    assert config["torch_dtype"] == "float32"  # a copy
    assert set(spelled) - set(config) == {"rope_parameters", "rope_theta", "rope_scaling", "dtype"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}},
            ["rope_parameters.rope_theta is 10000.0", "rope_theta is 1000000.0"],
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}},
            ["rope_parameters.factor is 2.0", "rope_scaling.factor is 4.0"],
        ),
        ({"rope_scaling": YARN, "rope_parameters": DEFAULT}, ["'default'", "'yarn'"]),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, ["'linear'", "'yarn'"]),
        ({"rope_theta": "1000000"}, ["'1000000'", "positive number"]),
        ({"rope_theta": True}, ["True", "positive number"]),
        ({"rope_theta": -1.0}, ["-1.0", "positive number"]),
        ({"rope_theta": float("nan")}, ["nan", "positive number"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling is 'yarn'", "expected one object"]),
        ({"rope_parameters": {"full_attention": MILLION}}, ["full_attention", "one object"]),
    ],
)
def test_two_readings_and_nonsense_are_refused(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as refused:
        rope_parameters(config, FILE)
    assert [word for word in ["m/config.json", *words] if word not in str(refused.value)] == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff{}"])
def test_what_is_no_json_object_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x_config.json"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"x_config\.json is not a JSON object.*restore"):
        read_json_object(file)
