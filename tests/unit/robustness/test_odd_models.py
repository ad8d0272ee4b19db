"""Weights that are not those of ``config.json``'s model are refused before any is loaded."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwen3_distill.errors import ModelError
from qwen3_distill.modeling.directory import check_model_dir
from qwen3_distill.modeling.known_answer import layerwise_logprobs
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.modeling.student_directory import check_student
from qwen3_distill.modeling.weight_headers import check_weight_headers
from tests.tiny_models import write_model

QUERY, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", seed=0)


def change_weights(model: Path, **changes: Any) -> None:
    weights = load_file(model / FILE)
    for name, change in changes.items():
        weights[name] = change(weights.get(name))
    save_file({n: w for n, w in weights.items() if w is not None}, model / FILE)


def load(model: Path) -> None:
    load_model(model, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (QUERY, lambda w: (w * 100).long(), "stored as I64"),
        (EMBEDDING, lambda w: (w * 100).to(torch.uint8), "stored as U8"),
        (NORM, lambda w: w > 0, "stored as BOOL"),
        (QUERY, lambda w: w.to(torch.complex64), "stored as C64"),
        (QUERY, lambda w: w.to(torch.float8_e4m3fn), "stored as F8_E4M3"),
        (NORM, lambda w: torch.tensor(1.0), r"of size \[\]"),
        (QUERY, lambda w: torch.zeros(65, 32), r"of size \[65, 32\]"),
        (HEAD, lambda w: torch.zeros(26, 32), r"of size \[26, 32\]"),
        (QUERY, lambda w: None, "weights are missing: model.layers.0.self_attn.q_proj"),
        ("model.layers.0.self_attn.q_proj.bias", lambda w: torch.ones(64), "q_proj.bias"),
        ("model.layers.7.x", lambda w: torch.ones(64), "does not have"),
    ],
)
def test_a_tensor_of_another_model_is_refused_unread(
    model: Path, name: str, change: Callable[[Any], Any], words: str
) -> None:
    change_weights(model, **{name: change})
    for read in (check_weight_headers, check_student, load):
        with pytest.raises(ModelError, match=words):
            read(model)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_other_size_in_the_config_is_refused(model: Path, data: st.DataObject) -> None:
    file = model / "config.json"
    before = file.read_text()
    config = json.loads(before)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    key = data.draw(st.sampled_from((*sizes, "num_attention_heads", "num_key_value_heads")))
    value = data.draw(st.integers(1, 500).filter(lambda size: size != config[key]))
    file.write_text(json.dumps(config | {key: value}))
    try:
        with pytest.raises(ModelError):
            check_weight_headers(model)
    finally:
        file.write_text(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(model: Path, value: float) -> None:
    change_weights(model, **{NORM: lambda w: w.index_fill(0, torch.tensor([3]), value)})
    with pytest.raises(ModelError, match=r"not finite: \['model\.norm\.weight'\]"):
        load(model)
    with pytest.raises(ModelError, match="logprobs are not finite"):
        layerwise_logprobs(model, torch.arange(5).numpy())


def test_a_tied_model_with_a_head_of_its_own_is_refused(model: Path) -> None:
    change_weights(model, **{HEAD: lambda w: torch.ones(260, 32)})
    with pytest.raises(ModelError, match="two matrices"):
        load(model)
    change_weights(model, **{HEAD: lambda w: load_file(model / FILE)[EMBEDDING].clone()})
    load(model)


def test_a_tensor_in_two_files_is_refused(model: Path) -> None:
    save_file({NORM: torch.ones(32)}, model / "second.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors and second\.safetensors both hold"):
        check_weight_headers(model)


def test_an_index_with_a_key_twice_is_refused(model: Path) -> None:
    (model / FILE).rename(model / "a.safetensors")
    (model / INDEX).write_text('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}')
    with pytest.raises(ModelError, match="a key stands twice"):
        check_model_dir(model)


@pytest.mark.parametrize("name", [FILE, "config.json", "tokenizer.json", "chat_template.jinja"])
def test_pipes_are_refused_and_never_opened(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(ModelError, match="is a pipe"):
        check_model_dir(model)


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def nothing(path: Path) -> None:
    path.symlink_to("gone")


@pytest.mark.parametrize("damage", [a_loop, nothing, Path.mkdir])
def test_weights_that_are_no_file_are_refused(model: Path, damage: Callable[[Path], None]) -> None:
    (model / FILE).unlink()
    damage(model / FILE)
    with pytest.raises(ModelError, match="a folder, or a link to no file"):
        check_model_dir(model)
