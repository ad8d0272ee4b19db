"""A trained student is its source's directory with other weights, written whole or not at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen3_distill.errors import ModelError, RunFolderError
from qwen3_distill.modeling import student_directory
from qwen3_distill.modeling.loading import load_identity, load_model
from qwen3_distill.modeling.student_directory import (
    check_student,
    read_student_files,
    stored_shapes,
    write_student,
)
from tests.tiny_models import TinyModels, write_model

WEIGHTS = {"model.norm.weight": torch.arange(4.0)}
KEPT = {
    "generation_config.json": b'{"do_sample": false,  "temperature": 0.6, "eos_token_id": 257}',
    "chat_template.jinja": "{# Grüße #}{{ messages[0].content }}\n\n".encode(),
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "merges.txt": b"#version: 0.2\r\n",
    "vocab.json": b'{"a":0}',
    "added_tokens.json": b"{}",
    "special_tokens_map.json": b'{"eos_token": "<|end|>", "mine": 1}',
    "tokenizer.model": b"\x00\xff",
    "LICENSE": b"MIT",
    "LICENSE.md": b"MIT",
    "NOTICE": b"",
    "modeling_mine.py": b"x = 1\n",
    "something_else.json": b"not json, and nobody's business",
}
LEFT = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors.index.json",
    "consolidated.00.pth",
    "optimizer.pt",
    "training_args.bin",
    "rng_state.pkl",
    "model-q8_0.gguf",
    "flax_model.msgpack",
    "trainer_state.json",
    "README.md",
    ".gitattributes",
    ".cache/huggingface/x",
    "onnx/model.json",
    "checkpoint-5/config.json",
    "train.jsonl",
    "figure.PNG",
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = write_model(tmp_path / "source", seed=0)
    for name, content in KEPT.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(content)
    return model


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_files_are_copied_byte_for_byte_and_only_those_of_the_student(
    source: Path, tmp_path: Path
) -> None:
    for name in LEFT:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"{}")
    os.mkfifo(source / "fifo")  # reading it would never end
    before = files_below(source)
    write_student(read_student_files(source), WEIGHTS, tmp_path / "new" / "student")
    assert files_below(source) == before
    found = files_below(tmp_path / "new" / "student")
    unchanged = {*KEPT, "tokenizer.json", "tokenizer_config.json"}
    assert found.keys() == unchanged | {"config.json", "model.safetensors"}
    assert {name: found[name] for name in unchanged} == {n: before[n] for n in unchanged}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["student"]


def test_links_of_a_cache_become_files(source: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    (source / "tokenizer.json").rename(blob)
    (source / "tokenizer.json").symlink_to(blob)
    write_student(read_student_files(source), WEIGHTS, tmp_path / "student")
    written = tmp_path / "student" / "tokenizer.json"
    assert not written.is_symlink()
    assert written.read_bytes() == blob.read_bytes()


def test_config_keeps_what_no_library_knows(source: Path, tmp_path: Path) -> None:
    file = source / "config.json"
    config = json.loads(file.read_text()) | {"mine": {"a": [1]}, "use_cache": False}
    file.write_text(json.dumps(config))
    weights = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    write_student(read_student_files(source), weights, tmp_path / "student")
    written = json.loads((tmp_path / "student" / "config.json").read_text())
    assert {k: written[k] for k in config} == config | {"dtype": "bfloat16"}
    assert written["torch_dtype"] == "bfloat16"
    assert written["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_the_source_may_be_gone_when_the_student_is_written(source: Path, tmp_path: Path) -> None:
    files, before = read_student_files(source), files_below(source)
    source.rename(tmp_path / "gone")
    write_student(files, WEIGHTS, tmp_path / "student")
    assert files_below(tmp_path / "student")["tokenizer.json"] == before["tokenizer.json"]


def test_shards_have_an_index_and_every_file_the_same_readers(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Any = student_directory.save_torch_state_dict
    monkeypatch.setattr(
        student_directory,
        "save_torch_state_dict",
        lambda *args, **kwargs: real(*args, max_shard_size=20_000, **kwargs),
    )
    model = load_model(tiny_models.teacher, device=torch.device("cpu"), dtype=torch.float32)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    write_student(read_student_files(tiny_models.teacher), weights, tmp_path / "student")
    shards = sorted((tmp_path / "student").glob("*.safetensors"))
    assert len(shards) > 1
    index = json.loads((tmp_path / "student" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights)
    again = load_model(tmp_path / "student", device=torch.device("cpu"), dtype=torch.float32)
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())
    assert len({path.stat().st_mode for path in (tmp_path / "student").iterdir()}) == 1


def test_a_directory_that_exists_keeps_its_other_files(source: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    (student / "additional_chat_templates").mkdir(parents=True)
    (student / "mine.txt").write_text("mine")
    (student / "config.json").write_text("old")
    write_student(read_student_files(source), WEIGHTS, student)
    assert (student / "mine.txt").read_text() == "mine"
    assert json.loads((student / "config.json").read_text())["model_type"] == "qwen3"
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_failed_write_leaves_nothing_and_says_what_to_do(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    files = read_student_files(source)
    monkeypatch.setattr(student_directory, "save_torch_state_dict", full)
    with pytest.raises(RunFolderError, match=r"student: .*No space left.*free space, then start"):
        write_student(files, WEIGHTS, tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    monkeypatch.undo()
    write_student(files, WEIGHTS, tmp_path / "student")
    assert load_file(tmp_path / "student" / "model.safetensors").keys() == WEIGHTS.keys()


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        file = model / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "generation config": (written("generation_config.json", b"{"), ["generation_config.json"]),
    "generation config list": (written("generation_config.json", b"[]"), ["expected an object"]),
    "special tokens": (written("special_tokens_map.json", b"{,"), ["special_tokens_map.json"]),
    "tokenizer config": (written("tokenizer_config.json", b""), ["tokenizer_config.json"]),
    "tokenizer": (written("tokenizer.json", b'{"model": 1}'), ["no usable tokenizer"]),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), ["no tokenizer.json"]),
    "config": (written("config.json", b'{"model_type":'), ["config.json is not a JSON object"]),
    "config's type": (edited("config.json", hidden_size="wide"), ["config.json cannot be read"]),
    "rope twice": (edited("config.json", rope_theta=5.0), ["rope_theta is 5.0", "10000.0"]),
    "quantized": (
        edited("config.json", quantization_config={"quant_method": "fp8"}),
        ["quantized", "unquantized directory"],
    ),
    "adapter": (written("adapter_config.json", b"{}"), ["adapter_config.json", "merge"]),
    "eos text": (edited("generation_config.json", eos_token_id="257"), ["'257'", "token id"]),
    "eos empty": (edited("generation_config.json", eos_token_id=[]), ["eos_token_id is []"]),
    "eos bool": (edited("generation_config.json", eos_token_id=True), ["eos_token_id is True"]),
    "broken link": (lambda m: (m / "merges.txt").symlink_to(m / "none"), ["merges.txt"]),
    "a git-lfs pointer": (
        lambda m: (m / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n"
        ),
        ["git-lfs pointer of", "git lfs pull"],
    ),
    "half a download": (lambda m: os.truncate(m / "model.safetensors", 900), ["half a download"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_read_is_met_before_the_training(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "source", seed=0)
    check_student(model)
    damage, words = DAMAGES[name]
    damage(model)
    with pytest.raises(ModelError) as refused:
        check_student(model)
    assert [word for word in words if word not in str(refused.value)] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
        {"temperature": 0.0},
        {"eos_token_id": [257, 256], "transformers_version": "4.37.0"},
        {"nobody_knows_this": {"a": 1}},
    ],
)
def test_generation_configs_of_the_hub_are_accepted(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "source", seed=0)
    edited("generation_config.json", **changes)(model)
    check_student(model)
    write_student(read_student_files(model), WEIGHTS, tmp_path / "student")
    copied = (tmp_path / "student" / "generation_config.json").read_bytes()
    assert copied == (model / "generation_config.json").read_bytes()
    assert 257 in load_identity(model).eos_ids


@pytest.mark.parametrize("stated", [True, False])
def test_a_head_that_is_not_tied_as_stated_is_refused(stated: bool, source: Path) -> None:
    edited("config.json", tie_word_embeddings=stated)(source)
    files = read_student_files(source)
    files.check_tied(stated)
    with pytest.raises(ModelError, match="tie_word_embeddings is"):
        files.check_tied(not stated)


def test_shapes_come_from_the_heads_of_the_files(tiny_models: TinyModels) -> None:
    shapes = stored_shapes(tiny_models.teacher)
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (260, 48)
