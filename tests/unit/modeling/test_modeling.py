import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3_distill.errors import ConfigError, ModelError
from qwen3_distill.modeling import digest, loading
from qwen3_distill.modeling.digest import are_of_directory, weights_digest
from qwen3_distill.modeling.head import (
    candidate_logits,
    entropy,
    logits_of,
    map_chunks,
    token_stats,
)
from qwen3_distill.modeling.loading import (
    allow_cudnn_attention,
    load_identity,
    load_model,
    load_tokenizer,
    output_head,
    resolve_device,
    resolve_dtype,
)
from tests.tiny_models import (
    CONTEXT_LENGTH,
    EOS_ID,
    VOCAB_SIZE,
    TinyModels,
    byte_tokenizer,
    write_model,
)

CPU = torch.device("cpu")

# --- Digest -------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def random_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": (10 * torch.randn(5, 7, generator=generator)).to(dtype),
        "b": (10 * torch.randn(11, generator=generator)).to(dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clones_have_one_digest(dtype: torch.dtype) -> None:
    weights = random_weights(dtype)
    clones = {name: weights[name].clone() for name in reversed(weights)}
    assert weights_digest(clones) == weights_digest(weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_bit_shows(dtype: torch.dtype) -> None:
    weights = random_weights(dtype)
    width = 8 * weights["a"].element_size()
    integer = {8: torch.int8, 16: torch.int16, 32: torch.int32}[width]
    seen = {weights_digest(weights)}
    for element in (0, 17, 34):
        for bit in range(width):
            flipped = weights["a"].clone()
            flipped.view(integer).view(-1)[element] ^= torch.tensor(1).bitwise_left_shift(bit)
            seen.add(weights_digest({**weights, "a": flipped}))
    assert len(seen) == 1 + 3 * width


def test_the_order_of_rows_and_elements_shows() -> None:
    weights = random_weights()
    rows, columns = weights["a"].clone(), weights["a"].clone()
    rows[[1, 3]] = rows[[3, 1]]
    columns[:, [0, 6]] = columns[:, [6, 0]]
    digests = {weights_digest({**weights, "a": a}) for a in (weights["a"], rows, columns)}
    assert len(digests) == 3


def test_names_shapes_and_dtypes_show() -> None:
    weights = random_weights()
    variants = [
        weights,
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["a"]},
        {"a": weights["a"].reshape(7, 5), "b": weights["b"]},
        {"a": weights["a"].view(torch.int32), "b": weights["b"]},
        {"a": weights["a"].T.contiguous(), "b": weights["b"]},
    ]
    assert len({weights_digest(variant) for variant in variants}) == len(variants)


def test_exchanged_tensors_of_one_shape_show() -> None:
    one, other = torch.randn(3, 3), torch.randn(3, 3)
    assert weights_digest({"a": one, "b": other}) != weights_digest({"a": other, "b": one})


def test_memory_layout_does_not_show() -> None:
    tensor = torch.randn(6, 4)
    strided = tensor.T.contiguous().T
    assert not strided.is_contiguous()
    assert weights_digest({"a": strided}) == weights_digest({"a": tensor})


def test_the_sign_of_zero_shows() -> None:
    assert weights_digest({"a": torch.zeros(3)}) != weights_digest({"a": -torch.zeros(3)})


def literal_checksum(words: list[int]) -> int:
    """As the documentation of the digest has it."""
    total = sum(word * (2 * 0x1E3779B97F4A7C15 * i + 1) for i, word in enumerate(words))
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("columns", [1, 4, 8, 1000])
@pytest.mark.parametrize(
    ("dtype", "length"),
    [(torch.int64, 0), (torch.int64, 1), (torch.int64, 31), (torch.int16, 33), (torch.int8, 37)],
)
def test_the_sum_is_the_formula_s_however_wide_its_rows(
    monkeypatch: pytest.MonkeyPatch, columns: int, dtype: torch.dtype, length: int
) -> None:
    monkeypatch.setattr(digest, "_COLUMNS", columns)
    limits = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(length)
    tensor = torch.randint(limits.min, limits.max, (length,), generator=generator, dtype=dtype)
    kind = torch.int64 if length * dtype.itemsize % 8 == 0 else dtype
    words = tensor.view(torch.uint8 if kind == torch.int8 else kind)
    assert digest._checksum(digest._word_sums(tensor)) == literal_checksum(words.tolist())


def test_tensors_of_an_iterable_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """As weights do that are merged one after another into the same memory."""
    monkeypatch.setattr(digest, "_COLUMNS", 4)
    weights = {name: torch.randn(2, 10).to(torch.bfloat16) for name in "ab"}  # 5 words
    memory = torch.empty(2, 10, dtype=torch.bfloat16)
    passing = ((name, memory.copy_(tensor)) for name, tensor in weights.items())
    assert weights_digest(passing) == weights_digest(weights)


def test_digests_stay_what_they_were() -> None:
    """Checkpoints and published weights carry them."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a": torch.randn(300, 4099, generator=generator).to(torch.bfloat16),
        "b": torch.randn(7, generator=generator),
        "c": torch.randn(3, 5, generator=generator).to(torch.float16),
        "d": torch.arange(8192),
    }
    assert weights_digest(weights) == "3e4214170d7dd276"


@pytest.mark.gpu
def test_the_device_does_not_show() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"rows": (300, 4099), "few": (5, 7), "odd": (3, 33001)}
    weights = {n: torch.randn(*shape, generator=generator) for n, shape in shapes.items()}
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        here = {name: (10 * weight).to(dtype) for name, weight in weights.items()}
        there = {name: weight.cuda() for name, weight in here.items()}
        assert weights_digest(there) == weights_digest(here)


@pytest.mark.parametrize("name", ["student", "teacher"])  # tied, and not
def test_the_weights_of_a_directory_are_known(tiny_models: TinyModels, name: str) -> None:
    model_dir = getattr(tiny_models, name)
    model = load_model(model_dir, device=CPU, dtype=torch.float32)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert are_of_directory(weights, model_dir)
    assert are_of_directory({"lm_head.weight": output_head(model)} | weights, model_dir)
    for changed in weights:
        other = weights | {changed: weights[changed] * 1.01}
        assert not are_of_directory(other, model_dir)


def test_weights_that_a_directory_lacks_are_not_its(tiny_models: TinyModels) -> None:
    assert not are_of_directory({}, tiny_models.student)
    stored = load_file(tiny_models.student / "model.safetensors")
    assert are_of_directory(stored, tiny_models.student)
    assert not are_of_directory(stored | {"one.more": torch.ones(2)}, tiny_models.student)


# --- Head ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [1, 4, 9, 100])
def test_chunked_logprobs_and_their_gradients_are_those_of_the_whole(chunk_tokens: int) -> None:
    hidden, head = torch.randn(9, 6, requires_grad=True), torch.randn(12, 6, requires_grad=True)
    target, cotangent = torch.arange(9), torch.randn(9)
    whole = torch.log_softmax(hidden @ head.T, dim=-1)
    stats = token_stats(hidden, head, target, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(stats.logprob_N, whole[torch.arange(9), target])
    torch.testing.assert_close(stats.entropy_N, -(whole.exp() * whole).sum(-1).detach())
    assert not stats.entropy_N.requires_grad
    ours = torch.autograd.grad(stats.logprob_N @ cotangent, (hidden, head))
    expected = torch.autograd.grad(whole[torch.arange(9), target] @ cotangent, (hidden, head))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_map_chunks_keeps_order_and_columns() -> None:
    rows, other = torch.arange(10.0), torch.arange(10.0, 20.0)
    doubled, summed = map_chunks(lambda a, b: (2 * a, a + b), (rows, other), chunk_tokens=3)
    assert doubled.tolist() == (2 * rows).tolist()
    assert summed.tolist() == (rows + other).tolist()


def test_logits_are_float32_inside_autocast() -> None:
    hidden, head = torch.randn(4, 64), torch.randn(8, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = logits_of(hidden, head)
        rounded = torch.nn.functional.linear(hidden, head)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden @ head.T)
    assert (rounded.float() - hidden @ head.T).abs().max() > 1e-3


def test_entropy_of_a_uniform_distribution_is_the_logarithm_of_its_size() -> None:
    logprobs = torch.log_softmax(torch.zeros(2, 8), dim=-1)
    torch.testing.assert_close(entropy(logprobs), torch.full((2,), 8.0).log())


# --- Loading ------------------------------------------------------------------------------------


def load(path: Path) -> torch.nn.Module:
    return load_model(path, device=CPU, dtype=torch.float32)


@pytest.fixture
def model_dir(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_models.teacher, tmp_path / "model"))


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def no_directory(path: Path) -> None:
    shutil.rmtree(path)


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def broken_config(path: Path) -> None:
    (path / "config.json").write_text("{", encoding="utf-8")


def config_is_a_list(path: Path) -> None:
    (path / "config.json").write_text("[]", encoding="utf-8")


def other_architecture(path: Path) -> None:
    edit_json(path / "config.json", model_type="llama")


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def missing_tensor(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_logits_of_candidates_are_products_in_float32_at_least(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 64, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(12, 64, generator=generator).to(dtype)
    ids = torch.randint(0, 12, (7, 3), generator=generator)
    logits = candidate_logits(hidden, head, ids)
    whole = hidden.double() @ head.double().T
    expected = whole.gather(-1, ids)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    cotangent = torch.randn(7, 3, generator=generator).to(logits)
    (ours,) = torch.autograd.grad(logits, hidden, cotangent, retain_graph=True)
    (exact,) = torch.autograd.grad(expected, hidden, cotangent.double())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, exact)


def test_logits_of_candidates_round_operands_as_autocast_does() -> None:
    """So that they fit statistics that another kernel computed under the same autocast."""
    hidden, head = torch.randn(5, 64), torch.randn(9, 64)
    ids = torch.arange(9).expand(5, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = candidate_logits(hidden, head, ids)
    rounded = hidden.bfloat16().float() @ head.bfloat16().float().T
    torch.testing.assert_close(logits, rounded)
    assert (logits - hidden @ head.T).abs().max() > 1e-3


def missing_head(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def other_shape(path: Path) -> None:
    edit_json(path / "config.json", intermediate_size=72)


def truncated_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_directory, r"does not exist \(working directory .*\); give the path"),
        (no_config, "has no config.json"),
        (broken_config, "not a JSON object"),
        (config_is_a_list, "not a JSON object"),
        (other_architecture, "model_type is 'llama', expected one of qwen3"),
        (no_weights, "no .*safetensors file: the weights are missing"),
        (missing_tensor, "weights are missing: model.layers.1.mlp.up_proj.weight"),
        (missing_head, "weights are missing: lm_head.weight"),
        (other_shape, "is of size"),
        (truncated_weights, "cannot be loaded"),
    ],
)
def test_a_directory_without_a_whole_model_is_refused(
    model_dir: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(model_dir)
    with pytest.raises(ModelError, match=message):
        load(model_dir)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_loaded_whole_and_for_evaluation(tiny_models: TinyModels, dtype: str) -> None:
    model = load_model(tiny_models.teacher, device=CPU, dtype=resolve_dtype(dtype))
    stored = load_file(tiny_models.teacher / "model.safetensors")
    own = dict(model.named_parameters())
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[n], w.to(resolve_dtype(dtype))) for n, w in stored.items())
    assert not model.training


def test_the_output_head_of_a_tied_model_is_its_embedding(tiny_models: TinyModels) -> None:
    tied = load_model(tiny_models.student, device=CPU, dtype=torch.float32)
    assert output_head(tied) is tied.get_input_embeddings().weight
    untied = load_model(tiny_models.teacher, device=CPU, dtype=torch.float32)
    assert output_head(untied) is untied.get_parameter("lm_head.weight")


def test_cuda_by_name_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(ConfigError, match="device=cuda, but PyTorch sees no CUDA device"):
        resolve_device("cuda")


def test_cuda_is_taken_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = ("auto", "cuda", "cpu")
    assert [resolve_device(name).type for name in names] == ["cuda", "cuda", "cpu"]


def test_attention_on_a_gpu_is_not_one_that_is_built_for_every_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        resolve_device("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        resolve_device("auto")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        allow_cudnn_attention()
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# --- Tokenizer and identity ---------------------------------------------------------------------


def test_a_directory_without_a_fast_tokenizer_is_refused(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        load_tokenizer(model_dir)


@pytest.mark.parametrize("content", ["", "{"])
def test_a_broken_tokenizer_is_refused(model_dir: Path, content: str) -> None:
    (model_dir / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(model_dir)


def test_the_identity_is_read_from_the_directory(tiny_models: TinyModels) -> None:
    identity = load_identity(tiny_models.student)
    assert identity.name == str(tiny_models.student)
    assert identity.vocab_size == VOCAB_SIZE
    assert identity.eos_ids == {EOS_ID}
    assert identity.context_length == CONTEXT_LENGTH


def test_an_identity_is_read_again_only_when_a_file_changed(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = list[Path]()

    def counted(path: Path, **options: Any) -> Any:
        reads.append(path)
        return load_tokenizer(path, **options)

    monkeypatch.setattr(loading, "load_tokenizer", counted)
    before = load_identity(model_dir)
    assert load_identity(model_dir) == before
    assert load_identity(model_dir, weights=False) == before
    assert reads == [model_dir]
    (model_dir / "chat_template.jinja").write_text("another", encoding="utf-8")
    assert load_identity(model_dir).chat_template_digest != before.chat_template_digest
    edit_json(model_dir / "generation_config.json", eos_token_id=[256, 258])
    assert load_identity(model_dir).eos_ids == {256, 258}
    assert len(reads) == 3
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="weights are missing"):
        load_identity(model_dir)


def test_using_a_tokenizer_does_not_change_its_digest(model_dir: Path) -> None:
    before = load_identity(model_dir)
    tokenizer = byte_tokenizer()
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(model_dir)
    assert load_identity(model_dir).tokenizer_digest == before.tokenizer_digest


def test_the_generation_config_decides_what_ends_a_response(model_dir: Path) -> None:
    edit_json(model_dir / "generation_config.json", eos_token_id=[256, 258])
    assert load_identity(model_dir).eos_ids == {256, 258}


def test_without_a_generation_config_the_models_eos_counts(tmp_path: Path) -> None:
    model_dir = write_model(tmp_path / "model", seed=0, eos_token_id=[EOS_ID, 3])
    (model_dir / "generation_config.json").unlink()
    assert load_identity(model_dir).eos_ids == {EOS_ID, 3}


@pytest.mark.parametrize("eos", [[], 100_000, [100_000, -1]])
def test_an_eos_that_no_model_can_sample_is_refused(model_dir: Path, eos: object) -> None:
    edit_json(model_dir / "generation_config.json", eos_token_id=eos)
    with pytest.raises(ModelError, match=r"no such token is among the 260 .* could never end"):
        load_identity(model_dir)


def test_the_tokenizers_eos_is_the_last_resort(model_dir: Path) -> None:
    (model_dir / "generation_config.json").unlink()
    edit_json(model_dir / "config.json", eos_token_id=None)
    assert load_identity(model_dir).eos_ids == {EOS_ID}


def test_a_model_that_could_never_stop_is_refused(model_dir: Path) -> None:
    (model_dir / "generation_config.json").unlink()
    edit_json(model_dir / "config.json", eos_token_id=None)
    edit_json(model_dir / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match=r"no eos_token_id .* a rollout could never end"):
        load_identity(model_dir)
