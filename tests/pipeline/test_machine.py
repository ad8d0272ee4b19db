"""What a machine lacks is said in one message, before anything is asked of the hub or started."""

import json
import sys
from pathlib import Path

import pytest

from qwen3_distill.config.load import check_config
from qwen3_distill.environments import installed as environments
from qwen3_distill.pipeline.assembly.machine import machine_problems
from tests.hub_stand_in import running_hub, use_hub
from tests.pipeline.builders import call_cli, tiny_values
from tests.tiny_models import TinyModels

ROOT = Path(__file__).parents[2]
VLLM = {"kind": "vllm"}


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a driver and without engines."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(environments, "machine_kind", lambda: "cpu")
    monkeypatch.setattr("qwen3_distill.pipeline.assembly.machine.machine_kind", lambda: "cpu")


@pytest.mark.parametrize("command", [("run",), ("config", "check")], ids=" ".join)
@pytest.mark.parametrize("name", ["h200.yaml", "h200-streaming.yaml", "gb10.yaml"])
def test_config_for_a_gpu_names_driver_and_engines_and_asks_the_hub_nothing(
    name: str, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "hub")
        file = ROOT / "configs" / name
        result = call_cli(*command, "--config", file, f"output_dir={tmp_path / 'run'}")
        assert hub.requests == []
    assert result.code == 2
    (error,) = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert "lacks what the config asks for" in error
    assert "scoring.device=cuda, but there is no CUDA device: no NVIDIA driver" in result.err
    assert "no environment of vllm, sglang, unsloth for a machine with an NVIDIA" in result.err
    assert "`qwen3-distill engines install vllm sglang unsloth`" in result.err
    assert "configs/demo.yaml" in result.err


def test_engine_that_is_not_installed_is_an_error_before_the_first_file_of_a_run(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    file = tmp_path / "c.json"
    values = tiny_values(tiny_models, tmp_path / "run", {"generation": VLLM})
    file.write_text(json.dumps(values))
    for command in (("run",), ("generate",), ("eval",), ("audit-teacher",)):
        changes = ["evaluation={prompts: {kind: task, split: eval}, verifier: {kind: task}}"]
        result = call_cli(*command, "--config", file, *changes)
        assert result.code == 2, command
        assert "`qwen3-distill engines install vllm`" in result.err, command
        assert "Traceback" not in result.err
    assert not (tmp_path / "run" / "logs").exists()
    # Stages that do not start it do not need it.
    values["generation"] = {"kind": "embedded", "device": "cpu"}
    values["training"] = {"kind": "unsloth"}
    file.write_text(json.dumps(values))
    out = ("--out", str(tmp_path / "r.parquet"))
    assert call_cli("generate", "--config", file, *out, "planning.device_memory_gib=64").code == 0
    values["training"] = {"kind": "embedded", "device": "cpu"}
    values["generation"] = VLLM
    file.write_text(json.dumps(values))
    for stage in ("score", "train"):
        assert "engines install" not in call_cli(stage, "--config", file).err


def test_only_engines_that_are_looked_up_are_missed(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    changes = {
        "generation": VLLM | {"python": "python3", "environment": {"PYTHONPATH": "/srv/vllm"}},
        "scoring": {
            "kind": "sglang",
            "model": str(tiny_models.teacher),
            "urls": ["http://127.0.0.1:30000"],
        },
        "training": {"kind": "unsloth", "python": sys.executable},
    }
    config = check_config(tiny_values(tiny_models, tmp_path / "run", changes))
    assert machine_problems(config) == []
    changes["training"] = {"kind": "unsloth", "python": str(tmp_path / "gone")}
    config = check_config(tiny_values(tiny_models, tmp_path / "run", changes))
    (problem,) = machine_problems(config)
    assert f"training.python={tmp_path / 'gone'} does not exist" in problem
    assert machine_problems(config, ("generation", "scoring")) == []
