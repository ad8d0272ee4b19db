"""The random models of real shapes: whole, loadable, of one tokenizer, and quantized right."""

import functools
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen3_distill.modeling.loading import load_identity, load_tokenizer
from qwen3_distill.modeling.shapes import QWEN3_SHAPES, ModelShape, read_shape
from tests.sharded import tensors

SCRIPT = Path(__file__).parents[3] / "scripts" / "make_shape_model.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_shape_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["make_tokenizer"] = functools.cache(module.make_tokenizer)  # the slow part
    return module


SMALL = replace(
    QWEN3_SHAPES["8B"],
    hidden_size=192,
    intermediate_size=320,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=151936,
)


def write(script: ModuleType, folder: Path, shape: ModelShape, **options: Any) -> Path:
    settings = {"fp8": False, "device": torch.device("cpu"), "seed": 0} | options
    script.write_model(folder, shape, **settings)
    return folder


def test_a_model_appears_when_it_is_whole_and_replaces_nothing(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "small"

    def full(*_: Any) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_shards", full)
        with pytest.raises(OSError, match="no space"):
            write(script, folder, SMALL)
    assert not folder.exists()
    write(script, folder, SMALL)
    assert [path.name for path in folder.parent.iterdir()] == ["small"]
    with pytest.raises(FileExistsError, match="small is there"):
        write(script, folder, SMALL)


@pytest.mark.parametrize("tied", [True, False])
def test_model_is_whole_and_of_the_shape(tied: bool, script: ModuleType, tmp_path: Path) -> None:
    shape = replace(SMALL, tied=tied)
    write(script, tmp_path, shape)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) == shape.num_parameters
    assert read_shape(tmp_path) == replace(shape, name=str(tmp_path))
    assert model.dtype == torch.bfloat16
    assert 0.019 < model.model.embed_tokens.weight.detach().float().std().item() < 0.021


def test_weights_may_lie_in_several_files(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tensors(write(script, tmp_path / "one", SMALL))
    monkeypatch.setattr(script, "SHARD_BYTES", 10**6)
    split = tensors(write(script, tmp_path / "many", SMALL))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert all(torch.equal(split[name], whole[name]) for name in whole)


def test_fp8_checkpoint_gives_its_weights_back(script: ModuleType, tmp_path: Path) -> None:
    plain = tensors(write(script, tmp_path / "plain", SMALL))
    fp8 = tensors(write(script, tmp_path / "fp8", SMALL, fp8=True))
    assert read_shape(tmp_path / "fp8").fp8_checkpoint
    scaled = [name for name in fp8 if name.endswith("_scale_inv")]
    assert len(scaled) == 7 * SMALL.num_layers
    for name in scaled:
        weight = fp8[name.removesuffix("_scale_inv")]
        scale = fp8[name].repeat_interleave(128, 0).repeat_interleave(128, 1)
        rows, columns = weight.shape
        back = weight.float() * scale[:rows, :columns]
        expected = plain[name.removesuffix("_scale_inv")].float()
        assert weight.dtype == torch.float8_e4m3fn
        assert float(weight.float().abs().max()) == 448
        # Three bits of fraction: half a step is a sixteenth of the value.
        assert torch.allclose(back, expected, rtol=1 / 16, atol=1e-4)
    size = sum(t.numel() * t.element_size() for t in fp8.values())
    assert size == SMALL.fp8_weight_bytes(2)


def test_shapes_may_be_distilled_into_one_another(script: ModuleType, tmp_path: Path) -> None:
    student = load_identity(write(script, tmp_path / "a", SMALL))
    other = replace(SMALL, hidden_size=128, tied=True)
    teacher = load_identity(write(script, tmp_path / "b", other, seed=1))
    assert student.tokenizer_digest == teacher.tokenizer_digest
    assert student.chat_template_digest == teacher.chat_template_digest
    assert student.eos_ids == teacher.eos_ids == {151645, 151643}


def test_text_becomes_one_token_per_byte_and_every_id_has_a_text(
    script: ModuleType, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(write(script, tmp_path, SMALL))
    text = "Größe 7"
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == SMALL.vocab_size
    assert tokenizer.decode([150_000, 151_935]) != ""
    messages = [{"role": "user", "content": "hi"}]
    rendered: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(rendered)["input_ids"].count(151645) == 1
