"""The answer that a teacher must give, against Hugging Face's forward pass."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen3_distill.errors import ModelError
from qwen3_distill.modeling import known_answer as module
from qwen3_distill.modeling.known_answer import (
    dequantized,
    known_answer,
    known_tokens,
    layerwise_logprobs,
)
from tests.tiny_models import TinyModels, write_model

PARITY_NATS = 1e-5
FAR_NATS = 0.5
BLOCK = (128, 128)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qwen3-distill" / "known-answers"


def forward(model_dir: Path, token_ids: np.ndarray) -> np.ndarray:
    """[T - 1] nats by Hugging Face's own model."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    ids = torch.tensor([token_ids.tolist()])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()


@pytest.mark.parametrize("head_rows", [7, 8192])
@pytest.mark.parametrize("name", ["student", "teacher"], ids=["tied", "untied"])
def test_layer_by_layer_gives_what_the_whole_model_gives(
    tiny_models: TinyModels, name: str, head_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEAD_ROWS", head_rows)
    model_dir = getattr(tiny_models, name)
    answer = known_answer(model_dir)
    expected = forward(model_dir, answer.token_ids)
    assert answer.logprobs.shape == (answer.token_ids.size - 1,)
    assert np.abs(answer.logprobs - expected).max() < PARITY_NATS
    assert np.abs(np.roll(answer.logprobs, 1) - expected).max() > FAR_NATS


def test_half_precision_weights_are_computed_in_float32(tmp_path: Path) -> None:
    model_dir = write_model(tmp_path / "model", seed=3)
    weights = load_file(model_dir / "model.safetensors")
    half = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    save_file(half, model_dir / "model.safetensors", metadata={"format": "pt"})
    ids = known_tokens(model_dir)
    gap = np.abs(layerwise_logprobs(model_dir, ids) - forward(model_dir, ids)).max()
    assert gap < PARITY_NATS


def test_weights_of_other_shapes_than_the_config_says_are_refused(tmp_path: Path) -> None:
    model_dir = write_model(tmp_path / "model", seed=3)
    file = model_dir / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 4}))
    with pytest.raises(ModelError, match=r"q_proj\.weight is of size \[64, 32\], but config\.json"):
        layerwise_logprobs(model_dir, np.arange(5))


def test_weights_in_several_files_are_found(tmp_path: Path) -> None:
    model_dir = write_model(tmp_path / "model", seed=3)
    ids = known_tokens(model_dir)
    whole = layerwise_logprobs(model_dir, ids)
    weights = load_file(model_dir / "model.safetensors")
    names = sorted(weights)
    save_file({n: weights[n] for n in names[::2]}, model_dir / "model-1.safetensors")
    save_file({n: weights[n] for n in names[1::2]}, model_dir / "model-2.safetensors")
    (model_dir / "model.safetensors").unlink()
    assert np.array_equal(layerwise_logprobs(model_dir, ids), whole)


def write_block_fp8(model_dir: Path, out: Path) -> Path:
    """A block-FP8 checkpoint, and beside it the float32 model that its numbers stand for."""
    weights = load_file(model_dir / "model.safetensors")
    quantized: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            quantized[name] = meant[name] = weight
            continue
        rows, columns = weight.shape
        padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
        padded[:rows, :columns] = weight
        blocks = padded.unfold(0, *BLOCK).unfold(1, *BLOCK)
        scale = blocks.abs().amax(dim=(-1, -2)).clamp(min=1e-12) / 448
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        quantized[name] = (weight / spread).to(torch.float8_e4m3fn)
        quantized[f"{name}_scale_inv"] = scale
        meant[name] = quantized[name].float() * spread
    for directory, tensors in ((out / "fp8", quantized), (out / "meant", meant)):
        directory.mkdir(parents=True)
        for file in model_dir.glob("*.json*"):
            (directory / file.name).write_bytes(file.read_bytes())
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    (out / "fp8" / "config.json").write_text(json.dumps(config))
    return out


def test_a_block_fp8_checkpoint_is_dequantized(tmp_path: Path) -> None:
    # Neither a multiple of a block's side nor less than one.
    model_dir = write_model(tmp_path / "model", seed=3, hidden_size=160, intermediate_size=200)
    made = write_block_fp8(model_dir, tmp_path / "made")
    ids = known_tokens(made / "fp8")
    found = layerwise_logprobs(made / "fp8", ids)
    assert np.abs(found - forward(made / "meant", ids)).max() < PARITY_NATS
    assert np.abs(found - layerwise_logprobs(model_dir, ids)).max() > 1e-3  # it was quantized


def test_every_block_has_its_own_scale() -> None:
    weight = torch.ones(3, 5).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert dequantized(weight, scale, (2, 2)).tolist() == [
        [1, 1, 2, 2, 3],
        [1, 1, 2, 2, 3],
        [4, 4, 5, 5, 6],
    ]


def test_another_quantization_is_refused_by_name(tmp_path: Path) -> None:
    model_dir = write_model(tmp_path / "model", seed=3)
    config = json.loads((model_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantized \('awq'\)"):
        known_answer(model_dir)


def test_a_missing_or_damaged_weight_is_named(tmp_path: Path) -> None:
    model_dir = write_model(tmp_path / "model", seed=3)
    weights = load_file(model_dir / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model_dir / "model.safetensors")
    with pytest.raises(ModelError, match=r"missing: model.layers.1.mlp.up_proj.weight"):
        known_answer(model_dir)
    (model_dir / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="cannot be loaded"):
        known_answer(model_dir)


def test_the_tokens_are_text_and_the_whole_vocabulary(tiny_models: TinyModels) -> None:
    ids = known_tokens(tiny_models.teacher)
    assert ids.size == module.TEXT_TOKENS + module.SPREAD_TOKENS
    assert ids[module.TEXT_TOKENS :].min() == 0
    assert ids.max() == 259


def test_the_tokens_fit_a_short_context(tmp_path: Path) -> None:
    assert known_tokens(write_model(tmp_path / "m", seed=1, max_position_embeddings=16)).size == 16


# --- Kept answers -------------------------------------------------------------------------------


def test_an_answer_is_kept_and_computed_again_where_it_is_damaged(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = write_model(tmp_path / "model", seed=3)
    answer = known_answer(model_dir)
    (file,) = cache.iterdir()
    times: list[int] = []

    def counted(*arguments: object) -> np.ndarray:
        times.append(1)
        return answer.logprobs

    monkeypatch.setattr(module, "layerwise_logprobs", counted)
    assert np.array_equal(known_answer(model_dir).logprobs, answer.logprobs)
    assert not times
    record = json.loads(file.read_text())
    for damage in (
        "{",
        "[]",
        json.dumps(record | {"logprobs": record["logprobs"][:-1]}),
        json.dumps(record | {"logprobs": [None, *record["logprobs"][1:]]}),
        json.dumps(record | {"token_ids": record["token_ids"][::-1]}),
    ):
        times.clear()
        file.write_text(damage)
        assert np.array_equal(known_answer(model_dir).logprobs, answer.logprobs)
        assert times == [1], damage


def test_other_weights_have_another_answer(tmp_path: Path, cache: Path) -> None:
    model_dir = write_model(tmp_path / "model", seed=3)
    before = known_answer(model_dir)
    write_model(model_dir, seed=4)
    after = known_answer(model_dir)
    assert np.abs(before.logprobs - after.logprobs).max() > FAR_NATS
    assert len(list(cache.iterdir())) == 2


def test_a_cache_folder_that_cannot_be_written_is_done_without(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert known_answer(tiny_models.teacher).logprobs.size > 0
