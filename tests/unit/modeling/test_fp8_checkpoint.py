"""FP8 checkpoints with a scale per channel: written, read, planned; others are refused."""

import copy
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3_distill.config.load import load_config
from qwen3_distill.errors import ConfigError, ModelError, RunFolderError
from qwen3_distill.modeling.directory import check_model_dir
from qwen3_distill.modeling.fp8_checkpoint import CHANNEL_SETTINGS
from qwen3_distill.modeling.known_answer import known_tokens, layerwise_logprobs
from qwen3_distill.modeling.loading import load_identity, load_model
from qwen3_distill.modeling.shapes import read_shape
from qwen3_distill.modeling.weight_headers import check_weight_headers
from qwen3_distill.pipeline.model_checks import check_teacher_files
from qwen3_distill.planning.time_plan import Planned, teacher_model
from tests.sharded import tensors
from tests.tiny_models import write_model

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "make_fp8_checkpoint.py"
TEACHER = ROOT / "models" / "lab" / "teacher"
PARITY_NATS = 1e-5
SURE_NATS = 1e-3
"""Found: 0.00002."""
ODD_NATS = 0.3
"""Found: 0.216."""
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_fp8_checkpoint", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lab(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(script, TEACHER, tmp_path_factory.mktemp("lab") / "fp8")


@pytest.fixture
def tiny(script: ModuleType, tmp_path: Path) -> Path:
    return write(script, write_model(tmp_path / "plain", seed=3), tmp_path / "fp8")


def write(script: ModuleType, model: Path, out: Path, **options: Any) -> Path:
    script.write_checkpoint(model, out, **({"say": lambda text: None} | options))
    return out


def change_weights(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of the checkpoint's one file; None: remove."""
    found = tensors(folder) | changes
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    save_file(kept, folder / "model-00001.safetensors", metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(kept, "model-00001.safetensors")}))


# --- The script -----------------------------------------------------------------------------------


def test_every_row_has_its_scale_and_the_rest_is_unchanged(script: ModuleType, lab: Path) -> None:
    plain, fp8 = load_file(TEACHER / "model.safetensors"), tensors(lab)
    scaled = {name.removesuffix("_scale") for name in fp8 if name.endswith("_scale")}
    assert len(scaled) == 7 * 3
    for name, weight in plain.items():
        if name not in scaled:
            assert torch.equal(fp8[name], weight), name
            continue
        scale = fp8[f"{name}_scale"]
        assert fp8[name].dtype == torch.float8_e4m3fn
        assert scale.dtype == torch.float32
        assert torch.equal(scale, weight.abs().amax(dim=1, keepdim=True) / 448)
        # Three bits of fraction: half a step is a sixteenth of the value.
        assert torch.allclose(fp8[name].float() * scale, weight, rtol=1 / 16, atol=2e-4 * 448)
        assert (fp8[name].float().abs().amax(dim=1) == 448).all()


def test_rows_are_quantized_alike_in_parts(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(70, 12)
    weight[3] = 0
    whole = script.quantize(weight)
    monkeypatch.setattr(script, "ROWS", 32)
    parts = script.quantize(weight)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(whole, parts, strict=True))
    assert whole[0][3].float().abs().max() == 0
    assert whole[1][3] > 0


def test_tokenizer_and_generation_config_are_taken_over(lab: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (lab / name).read_bytes() == (TEACHER / name).read_bytes()
    config, plain = (json.loads((each / "config.json").read_text()) for each in (lab, TEACHER))
    assert config.pop("quantization_config") == CHANNEL_SETTINGS
    assert config == plain
    ours, theirs = load_identity(lab), load_identity(TEACHER)
    assert (ours.tokenizer_digest, ours.eos_ids) == (theirs.tokenizer_digest, theirs.eos_ids)


def test_weights_may_lie_in_several_files(script: ModuleType, tiny: Path, tmp_path: Path) -> None:
    split = write(script, tmp_path / "plain", tmp_path / "many", shard_bytes=20_000)
    assert len(list(split.glob("*.safetensors"))) > 2
    whole = tensors(tiny)
    assert all(torch.equal(w.float(), whole[n].float()) for n, w in tensors(split).items())


def test_progress_ends_with_all_of_the_model(script: ModuleType, tmp_path: Path) -> None:
    said: list[str] = []
    write(script, write_model(tmp_path / "plain", seed=3), tmp_path / "fp8", say=said.append)
    assert re.fullmatch(r"(\S+ GiB) of \1 quantized, \S+ GiB/s, ETA 0 s", said[-1])


def test_a_quantized_model_is_not_quantized_again(script: ModuleType, tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"quantized already.*give the unquantized model"):
        write(script, tiny, tiny.with_name("again"))


@pytest.mark.parametrize("name", ["fp8", ".unfinished-fp8"])
def test_nothing_is_replaced(script: ModuleType, tmp_path: Path, name: str) -> None:
    model = write_model(tmp_path / "plain", seed=3)
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("kept")
    with pytest.raises(RunFolderError, match=f"{name} is there.*choose another directory"):
        write(script, model, tmp_path / "fp8")
    assert (tmp_path / name / "mine").read_text() == "kept"


def test_a_disk_that_is_too_small_is_named_first(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "plain", seed=3)
    written = sum(file.stat().st_size for file in (model).glob("*.safetensors"))
    out = tmp_path / "models" / "fp8"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=written // 8))
    with pytest.raises(RunFolderError, match=r"the checkpoint needs .* GiB free"):
        write(script, model, out)
    assert not out.parent.exists()


@pytest.mark.parametrize("raised", [KeyboardInterrupt, OSError("no space")])
def test_a_stop_leaves_nothing(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Any
) -> None:
    model = write_model(tmp_path / "plain", seed=3)
    quantize, times = script.quantize, list[int]()

    def stopping(weight: Tensor) -> Any:
        times.append(1)
        if len(times) == 5:
            raise raised
        return quantize(weight)

    monkeypatch.setattr(script, "quantize", stopping)
    with pytest.raises((KeyboardInterrupt, RunFolderError)):
        write(script, model, tmp_path / "fp8", shard_bytes=20_000)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_a_model_that_cannot_be_read_is_not_blamed_on_the_checkpoint(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "plain", seed=3)

    def fails(*given: Any, **options: Any) -> Any:
        raise OSError("input/output error")

    monkeypatch.setattr(script, "safe_open", fails)
    with pytest.raises(ModelError, match=r"model.safetensors cannot be read: input/output error"):
        write(script, model, tmp_path / "fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_weights_that_are_not_finite_are_refused(script: ModuleType, tmp_path: Path) -> None:
    model = write_model(tmp_path / "plain", seed=3)
    weights = load_file(model / "model.safetensors")
    weights[Q_PROJ][2, 1] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{Q_PROJ} is NaN or infinite"):
        write(script, model, tmp_path / "fp8")
    assert not (tmp_path / "fp8").exists()


def test_a_killed_command_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "fp8"
    slow = "import sys, time; import make_fp8_checkpoint as m; q = m.quantize\n"
    slow += "m.quantize = lambda w: (print('on', flush=True), time.sleep(60), q(w))[2]; m.main()"
    command = [sys.executable, "-c", slow, str(TEACHER), str(out)]
    with subprocess.Popen(command, cwd=SCRIPT.parent, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "on\n"
        assert (tmp_path / ".unfinished-fp8").is_dir()
        started = time.monotonic()
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=50) == 130
    assert time.monotonic() - started < 40
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_command_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, tmp_path / "none", tmp_path / "fp8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: model directory .*none does not exist .*\n", done.stderr)


# --- The known answer -----------------------------------------------------------------------------


def test_the_lab_teacher_keeps_its_logprobs(lab: Path) -> None:
    """A solution that it is sure of, and the known answer's odd tokens, of 10.9 nats each."""

    def mean_gap(ids: np.ndarray, start: int) -> float:
        gap = layerwise_logprobs(lab, ids) - layerwise_logprobs(TEACHER, ids)
        return float(np.abs(gap[start - 1 :]).mean())

    prompt = [258, *b"11-7-8+3*2=", 257, 259]
    solved = [*prompt, *b"11-7=4;4-8=15;15+3=18;18*2=2!18*2=17;#17", 257]
    assert mean_gap(np.array(solved, dtype=np.int32), len(prompt)) < SURE_NATS
    assert 0.1 < mean_gap(known_tokens(TEACHER), 1) < ODD_NATS


def test_logprobs_are_those_of_the_weights_that_are_meant(tiny: Path, tmp_path: Path) -> None:
    meant = shutil.copytree(tmp_path / "plain", tmp_path / "meant")
    fp8 = tensors(tiny)
    plain = {
        name: weight.float() * fp8[f"{name}_scale"] if f"{name}_scale" in fp8 else weight
        for name, weight in fp8.items()
        if not name.endswith("_scale")
    }
    save_file(plain, meant / "model.safetensors", metadata={"format": "pt"})
    ids = known_tokens(tiny)
    found = layerwise_logprobs(tiny, ids)
    assert np.abs(found - layerwise_logprobs(meant, ids)).max() < PARITY_NATS
    assert np.abs(found - layerwise_logprobs(tmp_path / "plain", ids)).max() > 1e-4


def test_scales_in_half_precision_are_read(tiny: Path) -> None:
    """llm-compressor stores them in bfloat16."""
    ids = known_tokens(tiny)
    whole = layerwise_logprobs(tiny, ids)
    scales = {n: t.bfloat16() for n, t in tensors(tiny).items() if n.endswith("_scale")}
    change_weights(tiny, **scales)
    gap = np.abs(layerwise_logprobs(tiny, ids) - whole)
    assert 0 < gap.max() < 0.1


# --- What is refused ------------------------------------------------------------------------------


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(settings: dict[str, Any]) -> None:
        for key in path[:-1]:
            settings = settings[key]
        settings[path[-1]] = to

    return change


GROUP = ("config_groups", "group_0")
OTHER_FORMS = {
    "tensor": (_set(*GROUP, "weights", "strategy", to="tensor"), "weights.strategy is 'tensor'"),
    "block": (_set(*GROUP, "weights", "strategy", to="block"), "weights.strategy is 'block'"),
    "4 bits": (_set(*GROUP, "weights", "num_bits", to=4), "weights.num_bits is 4, expected 8"),
    "integers": (_set(*GROUP, "weights", "type", to="int"), "weights.type is 'int'"),
    "no symmetry": (_set(*GROUP, "weights", "symmetric", to=False), "weights.symmetric is False"),
    "dynamic": (_set(*GROUP, "weights", "dynamic", to=True), "weights.dynamic is True"),
    "groups": (_set(*GROUP, "weights", "group_size", to=128), "weights.group_size is 128"),
    "static input": (
        _set(*GROUP, "input_activations", "dynamic", to=False),
        "input_activations.dynamic is False",
    ),
    "tensor input": (
        _set(*GROUP, "input_activations", "strategy", to="tensor"),
        "input_activations.strategy is 'tensor'",
    ),
    "no input": (_set(*GROUP, "input_activations", to=None), "input_activations is None"),
    "outputs": (_set(*GROUP, "output_activations", to={"a": 1}), "output_activations is {'a': 1}"),
    "targets": (_set(*GROUP, "targets", to=["re:.*mlp.*"]), "targets is ['re:.*mlp.*']"),
    "group's format": (_set(*GROUP, "format", to="pack-quantized"), "group_0.format is 'pack-"),
    "format": (_set("format", to="int-quantized"), "format is 'int-quantized'"),
    "whole head": (_set("ignore", to=[]), "ignore is []"),
    "more ignored": (_set("ignore", to=["lm_head", "re:.*mlp.*"]), "ignore is ['lm_head', 're"),
    "cache": (_set("kv_cache_scheme", to={"num_bits": 8}), "kv_cache_scheme is {'num_bits': 8}"),
    "two groups": (_set("config_groups", "group_1", to={}), "config_groups is {'group_0'"),
    "no groups": (_set("config_groups", to=None), "config_groups is None"),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_another_form_is_refused_with_what_is_read(tiny: Path, name: str) -> None:
    change, words = OTHER_FORMS[name]
    settings: dict[str, Any] = copy.deepcopy(dict(CHANNEL_SETTINGS))
    change(settings)
    set_quantization(tiny, settings)
    said = re.escape(words)
    accepted = "is read: FP8 weights with a static scale per channel.*teachers.md"
    with pytest.raises(ModelError, match=f"quantization_config.*{said}.*{accepted}"):
        check_model_dir(tiny)
    with pytest.raises(ModelError, match=f"compressed-tensors.*{said}.*scale per channel"):
        read_shape(tiny)


def set_quantization(model: Path, settings: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))


def test_what_llm_compressor_writes_is_read(tiny: Path) -> None:
    """Its settings besides ours: observers, nulls, a version, an empty sparsity."""
    settings: dict[str, Any] = copy.deepcopy(dict(CHANNEL_SETTINGS))
    empty = {"actorder": None, "block_structure": None, "group_size": None, "observer_kwargs": {}}
    group = settings["config_groups"]["group_0"]
    group["weights"] |= empty | {"observer": "minmax"}
    group["input_activations"] |= empty | {"observer": None}
    group["format"] = "float-quantized"
    settings |= {"global_compression_ratio": 1.46, "sparsity_config": {}, "transform_config": {}}
    settings["version"] = "0.11.0"
    set_quantization(tiny, settings)
    check_weight_headers(check_model_dir(tiny))
    assert layerwise_logprobs(tiny, known_tokens(tiny)).size


def _without_scale(found: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {f"{Q_PROJ}_scale": None}


def _flat_scale(found: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {f"{Q_PROJ}_scale": found[f"{Q_PROJ}_scale"].flatten()}


def _scale_of_inputs(found: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {f"{Q_PROJ}_scale": torch.ones(found[Q_PROJ].shape[1], 1)}


def _whole_weight(found: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {Q_PROJ: found[Q_PROJ].bfloat16()}


def _small_embedding(found: dict[str, Tensor]) -> dict[str, Tensor | None]:
    name = "model.embed_tokens.weight"
    return {name: found[name].to(torch.float8_e4m3fn)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_scale, r"q_proj.weight_scale is missing, expected a float of size \[64, 1\]"),
        (_flat_scale, r"q_proj.weight_scale is F32 of size \[64\], expected .*\[64, 1\]"),
        (_scale_of_inputs, r"q_proj.weight_scale is F32 of size \[32, 1\], expected .*\[64, 1\]"),
        (_whole_weight, r"q_proj.weight is stored as BF16, expected F8_E4M3"),
        (_small_embedding, r"embed_tokens.weight is stored as F8_E4M3, expected not in FP8"),
    ],
)
def test_weights_that_do_not_fit_the_form_are_refused(
    tiny: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor | None]], words: str
) -> None:
    change_weights(tiny, **change(tensors(tiny)))
    with pytest.raises(ModelError, match=words):
        layerwise_logprobs(tiny, known_tokens(tiny))


def test_pytorch_does_not_load_it(tiny: Path) -> None:
    with pytest.raises(ModelError, match="scale per channel, which SGLang and vLLM serve"):
        load_model(tiny, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["scoring.quantization=fp8"],
            "this teacher's quantization=fp8 quantizes a bfloat16 model.*null",
        ),
        (["scoring={kind: embedded, device: cpu}"], "kind=embedded does not compute with"),
        (["scoring.quantization=null"], None),
        (["scoring.quantization=fp8", "scoring.urls=[http://10.0.0.2:30000]"], None),
    ],
)
def test_its_engine_serves_it_as_it_is(tiny: Path, settings: list[str], words: str | None) -> None:
    named = [*settings, f"scoring.model={tiny}"]
    if "embedded" in settings[0]:
        named = [settings[0].replace("{", f"{{model: {tiny}, ")]
    config = load_config(ROOT / "configs" / "h200.yaml", named)
    if words is None:
        assert str(tiny) in check_teacher_files(config).text
        return
    with pytest.raises(ConfigError, match=words):
        check_teacher_files(config)


# --- Its plan -------------------------------------------------------------------------------------


def test_its_size_is_planned_to_the_byte(lab: Path) -> None:
    shape = read_shape(lab)
    assert shape.fp8_checkpoint
    assert shape.fp8_per_channel
    stored = sum(t.numel() * t.element_size() for t in tensors(lab).values())
    assert shape.fp8_weight_bytes(4) == stored  # the lab's other weights are float32


def test_its_products_are_planned_per_channel(lab: Path) -> None:
    config = load_config(ROOT / "configs" / "gb10.yaml", ["scoring.quantization=null"])
    shape = read_shape(lab)
    for fp8_per_channel in (True, False):
        teacher = replace(shape, fp8_per_channel=fp8_per_channel)
        planned = Planned(config=config, student=shape, teacher=teacher, recomputed_layers=0)
        model = teacher_model(planned)
        assert model.fp8
        assert model.fp8_blocks is not fp8_per_channel
