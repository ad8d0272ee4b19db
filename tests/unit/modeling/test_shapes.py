"""Parameter counts are exact, and read from a directory's config alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from qwen3_distill.errors import ConfigError, ModelError
from qwen3_distill.modeling.shapes import QWEN3_SHAPES, named_shape, read_shape
from tests.tiny_models import TinyModels, write_model

PARAMETERS = {
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
}
"""As on the models' pages: tied embeddings once, untied ones twice."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_released_models(name: str) -> None:
    assert QWEN3_SHAPES[name].num_parameters == PARAMETERS[name]
    assert QWEN3_SHAPES[name].tied == (name in ("0.6B", "1.7B", "4B"))


@pytest.mark.parametrize("tied", [True, False])
def test_count_of_a_real_model_is_what_torch_counts(tied: bool, tmp_path: Path) -> None:
    overrides = {"num_attention_heads": 4, "head_dim": 8, "num_hidden_layers": 3}
    write_model(tmp_path / "m", seed=0, tie_word_embeddings=tied, **overrides)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert read_shape(tmp_path / "m").num_parameters == sum(p.numel() for p in model.parameters())


def test_cache_bytes_count_keys_and_values_of_every_layer() -> None:
    assert QWEN3_SHAPES["4B"].kv_bytes_per_token(2) == 2 * 36 * 8 * 128 * 2
    assert QWEN3_SHAPES["32B"].kv_bytes_per_token(2) == 262_144


def test_adapters_count_both_factors_of_the_named_layers() -> None:
    shape = QWEN3_SHAPES["4B"]
    assert shape.lora_parameters(32, ["q_proj"]) == 36 * 32 * (2560 + 4096)
    assert shape.lora_parameters(32, list(shape.linear_layers)) == 66_060_288
    assert shape.lora_parameters(32, ["lm_head"]) == 0


def test_fp8_halves_the_linear_layers_and_nothing_else() -> None:
    shape = QWEN3_SHAPES["32B"]
    scales = 4 * shape.linear_parameters // (128 * 128)
    saved = shape.weight_bytes(2) - shape.fp8_weight_bytes(2)
    assert saved == shape.linear_parameters - scales
    assert shape.fp8_weight_bytes(2) > shape.linear_parameters + 2 * shape.embedding_parameters


def test_fp8_checkpoint_is_seen_in_its_config(tiny_models: TinyModels, tmp_path: Path) -> None:
    assert not read_shape(tiny_models.teacher).fp8_checkpoint
    values = config_of(tiny_models)
    quantized = values | {"quantization_config": {"quant_method": "fp8"}}
    assert read_shape(write(tmp_path, quantized)).fp8_checkpoint


def config_of(tiny_models: TinyModels) -> dict[str, Any]:
    return json.loads((tiny_models.teacher / "config.json").read_text())


def write(directory: Path, values: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def test_weights_are_not_needed(tiny_models: TinyModels, tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, config_of(tiny_models)))
    assert shape.hidden_size == 48


def test_other_quantization_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    values = config_of(tiny_models) | {"quantization_config": {"quant_method": "awq"}}
    with pytest.raises(ModelError, match="awq"):
        read_shape(write(tmp_path, values))


def test_missing_directory_and_missing_key_are_named(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"nowhere.config.json does not exist"):
        read_shape(tmp_path / "nowhere")
    values = config_of(tiny_models)
    del values["head_dim"]
    with pytest.raises(ModelError, match="head_dim"):
        read_shape(write(tmp_path, values))
    with pytest.raises(ModelError, match="does not hold the shape"):
        read_shape(write(tmp_path, [1]))


def test_names_of_shapes() -> None:
    assert named_shape("32B") == QWEN3_SHAPES["32B"]
    assert named_shape("32B-FP8").fp8_checkpoint
    assert named_shape("32B-fp8").num_parameters == PARAMETERS["32B"]
    for wrong in ("33B", "32B-AWQ", "32B-", "", "qwen"):
        with pytest.raises(ConfigError, match=r"expected one of 0\.6B"):
            named_shape(wrong)
