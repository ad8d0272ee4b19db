"""`qwen3-distill plan`."""

from pathlib import Path

import yaml

from tests.pipeline.builders import call_cli
from tests.tiny_models import TinyModels


def write_config(folder: Path, tiny_models: TinyModels) -> Path:
    values = {
        "output_dir": "runs/plan",
        "steps": 1,
        "prompts_per_step": 256,
        "student": {"model": str(tiny_models.student)},
        "prompts": {"kind": "task"},
        "generation": {"kind": "vllm"},
        "scoring": {"kind": "sglang", "model": str(tiny_models.teacher)},
        "training": {"kind": "unsloth"},
        "objective": {"kind": "sampled_reverse_kl"},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_command_prints_the_table_and_the_settings(tiny_models: TinyModels, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_models)
    result = call_cli("plan", "-c", str(file), "--device-memory-gib", "32")
    assert result.code == 0, result.err
    for word in ("teacher", "student", "learner", "key-value cache", "left free", "32.0"):
        assert word in result.out
    for setting in ("memory_fraction", "max_total_tokens", "kv_cache_gib", "memory_gib"):
        assert f"{setting}=" in result.out


def test_command_plans_shapes_without_directories(tiny_models: TinyModels, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_models)
    shapes = ["--shape-student", "4B", "--shape-teacher", "32B-FP8"]
    big = call_cli("plan", "-c", str(file), *shapes, "--device-memory-gib", "140")
    assert (big.code, "32.76 B" in big.out) == (0, True)
    small = call_cli("plan", "-c", str(file), *shapes, "--device-memory-gib", "64")
    assert small.code == 2
    assert "What would free memory" in small.err
    assert call_cli("plan", "-c", str(file), "--shape-teacher", "31B").code == 2
