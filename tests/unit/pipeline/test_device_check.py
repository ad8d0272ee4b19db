"""A run warns of a slow GPU before its engines start."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.pipeline import device_check
from qwen3_distill.pipeline.device_check import speed_notes
from qwen3_distill.planning import device_speed
from qwen3_distill.planning.device_speed import Speed

CONFIGS = Path(__file__).parents[3] / "configs"
STUCK = Speed(copy_gbs=120, bf16_tflops=25, clock_mhz=850, highest_mhz=3003)
GOOD = Speed(copy_gbs=215, bf16_tflops=80, clock_mhz=2400, highest_mhz=3003)


@pytest.fixture
def gb10(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GB10 that measures as fast as it should."""
    monkeypatch.setattr(device_check, "is_unified_here", lambda: True)
    monkeypatch.setattr(device_check, "detect_gpu", lambda: SimpleNamespace(name="NVIDIA GB10"))
    monkeypatch.setattr(device_check, "measure_speed", lambda: GOOD)
    return monkeypatch


def notes(config: RunConfig) -> tuple[list[str], list[str]]:
    """Return the warnings of a run, and the stages that it names."""
    said: list[str] = []
    return speed_notes(config, said.append), said


def test_stuck_gpu_is_a_warning_and_a_good_one_is_none(gb10: pytest.MonkeyPatch) -> None:
    config = load_config(CONFIGS / "gb10.yaml", [])
    assert notes(config) == ([], ["looking at the GPU's clock and bandwidth"])
    gb10.setattr(device_check, "measure_speed", lambda: STUCK)
    (note,), _ = notes(config)
    for words in ("device speed: NVIDIA GB10", "850 of 3,003 MHz", "power cable"):
        assert words in note


def test_gpu_that_pytorch_cannot_use_is_no_warning(gb10: pytest.MonkeyPatch) -> None:
    gb10.setattr(device_check, "measure_speed", lambda: "it was not measured: no CUDA")
    assert notes(load_config(CONFIGS / "gb10.yaml", []))[0] == []


def test_nothing_is_measured_on_a_card_or_for_embedded_engines(gb10: pytest.MonkeyPatch) -> None:
    def measured() -> Speed:
        raise AssertionError("measured")

    gb10.setattr(device_check, "measure_speed", measured)
    assert notes(load_config(CONFIGS / "demo.yaml", [])) == ([], [])
    gb10.setattr(device_check, "is_unified_here", lambda: False)
    assert notes(load_config(CONFIGS / "h200.yaml", [])) == ([], [])


@pytest.mark.parametrize("printed", ["", "a banner", "[1, 2]", '{"nothing": 1}'])
def test_a_probe_that_says_something_else_measured_nothing(
    printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], 0, stdout=printed, stderr="")
    monkeypatch.setattr(device_speed.subprocess, "run", lambda *given, **options: done)
    found = device_speed.measure_speed()
    assert isinstance(found, str)
    assert found.startswith("it was not measured")
