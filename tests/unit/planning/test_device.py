"""What the driver and the system say, without a driver."""

import os
from pathlib import Path

import pytest

from qwen3_distill.errors import ConfigError
from qwen3_distill.planning import device
from qwen3_distill.planning.device import detect_memory, memory_to_plan


@pytest.fixture
def no_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def fake_smi(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> Path:
    """An `nvidia-smi` that does what ``script`` says and notes its arguments."""
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/arguments\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder / "arguments"


def meminfo(monkeypatch: pytest.MonkeyPatch, file: Path, text: str) -> None:
    file.write_text(text)
    monkeypatch.setattr(device, "_MEMINFO", file)


def test_gpu_with_its_own_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_smi(monkeypatch, tmp_path, "echo 'NVIDIA H200, 143000'; echo 'NVIDIA H200, 5'")
    found = detect_memory()
    assert (found.kind, found.name) == ("cuda", "NVIDIA H200")
    assert found.free_bytes == 143000 * 2**20


def test_first_visible_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = fake_smi(monkeypatch, tmp_path, "echo 'NVIDIA H200, 7'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert detect_memory().free_bytes == 7 * 2**20
    assert "--id=3" in arguments.read_text()


def test_unified_memory_is_what_the_system_can_give(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_smi(monkeypatch, tmp_path, "echo 'NVIDIA GB10, [N/A]'")
    meminfo(monkeypatch, tmp_path / "meminfo", "MemFree: 5 kB\nMemAvailable:  1024 kB\n")
    found = detect_memory()
    assert (found.kind, found.name, found.free_bytes) == ("unified", "NVIDIA GB10", 2**20)


@pytest.mark.parametrize("memory", ["[N/A]", "50000"])
def test_unified_device_is_known_by_its_name_whatever_its_driver_reports(
    memory: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_smi(monkeypatch, tmp_path, f"echo 'NVIDIA GB10, {memory}'")
    meminfo(monkeypatch, tmp_path / "meminfo", "MemAvailable:  1024 kB\n")
    assert (detect_memory().kind, detect_memory().free_bytes) == ("unified", 2**20)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("NVIDIA GB10, [N/A]", "unified"),
        ("A new one, [N/A]", "unified"),
        ("NVIDIA H200, 7", "cuda"),
    ],
)
def test_stated_memory_is_of_the_kind_of_the_gpu_here(
    line: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_smi(monkeypatch, tmp_path, f"echo '{line}'")
    found = memory_to_plan(108)
    assert (found.kind, found.free_bytes) == (kind, 108)
    assert memory_to_plan(108, unified=True).kind == "unified"
    assert memory_to_plan(108, unified=False).kind == "cuda"


@pytest.mark.usefixtures("no_visible_gpu")
def test_stated_memory_is_a_cards_where_no_gpu_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert memory_to_plan(108).kind == "cuda"
    meminfo(monkeypatch, tmp_path / "meminfo", "MemAvailable:  1024 kB\n")
    assert memory_to_plan().kind == "cpu"
    assert memory_to_plan(unified=False).kind == "cuda"  # named devices, with what is free here
    planned = memory_to_plan(unified=True)
    assert (planned.kind, planned.free_bytes) == ("unified", 2**20)


@pytest.mark.parametrize("script", ["exit 9", "true"])
def test_driver_that_fails_counts_as_no_gpu(
    script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_smi(monkeypatch, tmp_path, script)
    assert detect_memory().kind == "cpu"


@pytest.mark.usefixtures("no_visible_gpu")
def test_hidden_gpu_counts_as_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo(monkeypatch, tmp_path / "meminfo", "MemAvailable:  2048 kB\n")
    found = detect_memory()
    assert (found.kind, found.free_bytes) == ("cpu", 2 * 2**20)


@pytest.mark.usefixtures("no_visible_gpu")
def test_unknown_memory_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "_MEMINFO", tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"set planning\.device_memory_gib"):
        detect_memory()
