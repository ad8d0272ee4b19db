"""GGUF files of tiny models: read back they are the student."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen3_distill.errors import EngineStartError, ModelError
from qwen3_distill.export import gguf_check
from qwen3_distill.export.gguf_check import F16_TOLERANCE, check_gguf
from qwen3_distill.export.gguf_file import Quant, check_expressible, write_gguf
from tests.tiny_models import write_model
from tests.unit.export.bpe_models import CORPUS, write_bpe_model
from tests.unit.export.support import call_export, contents, refused

gguf: Any = pytest.importorskip("gguf")


def _write(model: Path, quant: Quant = "f16") -> Path:
    file = model.parent / f"{model.name}-{quant}.gguf"
    write_gguf(model, file, quant=quant, name="tiny", tokenizer=check_expressible(model))
    return file


def _fields(file: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(file).fields
    return {name: field.contents() for name, field in fields.items()}


def _types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_dim", [32, 16])
def test_a_qwen_like_model_survives_float16(tmp_path: Path, tied: bool, head_dim: int) -> None:
    model = write_bpe_model(
        tmp_path / "model", tie_word_embeddings=tied, head_dim=head_dim, rms_norm_eps=1e-4
    )
    file = _write(model)
    check = check_gguf(model, file, "f16")
    assert 0 < check.max_abs_logit_diff <= F16_TOLERANCE
    assert (check.num_positions, check.same_top_fraction > 0.98) == (256, True)
    types = _types(file)
    assert ("output.weight" in types) is not tied
    assert types["blk.1.attn_q_norm.weight"] == types["output_norm.weight"] == "F32"
    assert types["token_embd.weight"] == types["blk.0.ffn_down.weight"] == "F16"
    fields = _fields(file)
    assert fields["general.architecture"] == "qwen3"
    assert {key.removeprefix("qwen3."): fields[key] for key in fields if "qwen3." in key} == {
        "block_count": 2,
        "context_length": 1024,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-4),
        "rope.freq_base": 1e6,
        "vocab_size": 400,
    }
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16


def test_the_files_tokenizer_and_template_are_the_directorys(tmp_path: Path) -> None:
    model = write_bpe_model(tmp_path / "model")
    file = _write(model)
    own: Any = AutoTokenizer.from_pretrained(model)
    read: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    messages = [{"role": "user", "content": text} for text in CORPUS]
    rendered = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert (
        read.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == rendered
    )
    for text in (*CORPUS, rendered, "<think>\n\n</think>a <think> b<|im_end|>"):
        assert read.encode(text) == own.encode(text)
        assert read.decode(read.encode(text)) == text
    fields = _fields(file)
    assert fields["tokenizer.ggml.eos_token_id"] == own.convert_tokens_to_ids("<|im_end|>")
    assert fields["tokenizer.ggml.eom_token_id"] == own.convert_tokens_to_ids("<|endoftext|>")
    assert fields["tokenizer.ggml.padding_token_id"] == own.pad_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.ggml.bos_token_id" not in fields


def test_q8_0_is_measured_and_not_limited(tmp_path: Path) -> None:
    model = write_bpe_model(tmp_path / "model")
    file = _write(model, "q8_0")
    assert check_gguf(model, file, "q8_0").max_abs_logit_diff > F16_TOLERANCE
    assert _types(file)["token_embd.weight"] == "Q8_0"
    assert file.stat().st_size < 0.7 * _write(model).stat().st_size


def test_q8_0_keeps_rows_that_its_blocks_do_not_divide_in_float16(tmp_path: Path) -> None:
    model = write_bpe_model(tmp_path / "model", hidden_size=48)
    file = _write(model, "q8_0")
    types = _types(file)
    assert (types["token_embd.weight"], types["blk.0.ffn_down.weight"]) == ("F16", "Q8_0")
    assert check_gguf(model, file, "q8_0").max_abs_logit_diff > F16_TOLERANCE


def test_bfloat16_and_several_files_are_read(tmp_path: Path) -> None:
    model = write_bpe_model(tmp_path / "model")
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="20KB")
    assert len(list(model.glob("*.safetensors"))) > 1
    check = check_gguf(model, _write(model), "f16")
    assert check.max_abs_logit_diff <= 1e-4  # float16 holds bfloat16's digits


def test_a_model_of_bytes_alone_works_too(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", seed=0)
    file = _write(model)
    assert _fields(file)["tokenizer.ggml.merges"] == []
    assert check_gguf(model, file, "f16", max_logit_diff=0.05).max_abs_logit_diff < 0.05


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}},
            "rope_type='yarn'",
        ),
    ],
)
def test_a_model_that_qwen3_cannot_express_is_refused(
    tmp_path: Path, overrides: dict[str, Any], words: str
) -> None:
    model = write_bpe_model(tmp_path / "model", **overrides)
    with pytest.raises(ModelError, match=words):
        check_expressible(model)


def test_values_beyond_float16_and_unknown_tensors_are_refused(tmp_path: Path) -> None:
    model = write_bpe_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = 1e5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} has a value of magnitude 100000"):
        _write(model)
    tensors[name][0, 0] = 0
    save_file(tensors | {"model.extra.weight": torch.zeros(2)}, model / "model.safetensors")
    with pytest.raises(ModelError, match=r"no tensor for model\.extra\.weight"):
        _write(model)


def test_a_file_of_other_weights_is_found_out(tmp_path: Path) -> None:
    model = write_bpe_model(tmp_path / "model")
    file = _write(model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0] += 0.5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"another model than .* differ by"):
        check_gguf(model, file, "f16")


def test_a_file_that_lacks_a_tensor_is_found_out(tmp_path: Path) -> None:
    model = write_bpe_model(tmp_path / "model")
    whole = load_file(model / "model.safetensors")
    part = {name: tensor for name, tensor in whole.items() if "layers.1.mlp.up" not in name}
    save_file(part, model / "model.safetensors", metadata={"format": "pt"})
    file = _write(model)
    save_file(whole, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        check_gguf(model, file, "f16")


def test_a_file_with_other_tokens_is_found_out(tmp_path: Path) -> None:
    model = write_bpe_model(tmp_path / "model")
    tokenizer = check_expressible(model)
    file = tmp_path / "m.gguf"
    first, second = tokenizer.tokens.index("a"), tokenizer.tokens.index("b")
    tokenizer.tokens[first], tokenizer.tokens[second] = "b", "a"
    write_gguf(model, file, quant="f16", name="tiny", tokenizer=tokenizer)
    with pytest.raises(ModelError, match="as other tokens"):
        check_gguf(model, file, "f16")


def test_the_command_writes_checks_and_describes(full_run: Path, tmp_path: Path) -> None:
    before = contents(full_run)
    for quant in ("f16", "q8_0"):
        out = tmp_path / quant
        limit = ("--max-logit-diff", "0.05")  # these random weights are large
        said = call_export(full_run, "--to", "gguf", "--quant", quant, "--out", out, *limit)
        assert "max abs logit difference to student/" in said
        assert {path.name for path in out.iterdir()} == {
            *("README.md", "export.json", f"run-{quant}.gguf")
        }
        card = (out / "README.md").read_text()
        assert "library_name: gguf" in card
        assert "Accuracy of this file" in card
    assert contents(full_run) == before


def test_a_file_that_differs_is_not_kept(
    full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (full_run, "--to", "gguf", "--out", tmp_path / "out")
    refused(*arguments, "--max-logit-diff", "1e-6", words=("changes", "--max-logit-diff"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(gguf_check, "largest_difference", lambda left, right: float("nan"))
    refused(*arguments, words=("differ by nan", "not kept"))
    assert not list(tmp_path.iterdir())


def test_without_the_package_it_says_what_to_install(
    full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    arguments = (full_run, "--to", "gguf", "--out", tmp_path / "out")
    error = refused(*arguments, words=("pip install 'qwen3-distill[gguf]'",))
    assert isinstance(error, EngineStartError)
    assert not list(tmp_path.iterdir())
