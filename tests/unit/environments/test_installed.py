"""Environments of this machine: listed, found by kind and version, and removed; the commands."""

import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from qwen3_distill.environments import installed as module
from qwen3_distill.environments.installed import (
    engine_python,
    find,
    installed,
    machine_kind,
    remove,
)
from qwen3_distill.environments.make import digest
from qwen3_distill.errors import ConfigError
from tests.pipeline.builders import call_cli

OURS = f"{sys.version_info[0]}.{sys.version_info[1]}"
Make: TypeAlias = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DRIVER", Path("/no/driver"))
    monkeypatch.setattr(module.shutil, "which", lambda name: None)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a folder that looks like a made environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "qwen3-distill" / "environments"

    def folder(name: str, *, version: str = OURS, current: bool = True, works: bool = True) -> Path:
        tag = f"{version} {sysconfig.get_platform()}"
        path = cache / f"{name}-{digest(name, tag) if current else '0' * 12}"
        (path / "bin").mkdir(parents=True)
        (path / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {version}.9\n")
        python = sys.executable if works else str(path / "gone")
        (path / "bin" / "python").symlink_to(python)
        engine = name.rpartition("-")[0]
        site = path / "lib" / f"python{version}" / "site-packages"
        for package, number in ((engine, "1.2.3"), ("torch", "2.0.0+cpu"), ("other", "9")):
            info = site / f"{package}-{number}.dist-info"
            info.mkdir(parents=True)
            metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n"
            (info / "METADATA").write_text(metadata)
        return path

    return folder


# --- The machine --------------------------------------------------------------------------------


def test_kind_follows_from_the_driver_and_from_hidden_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine_kind() == "cpu"
    program = tmp_path / "nvidia-smi"
    for printed, kind in (("echo GPU 0: NVIDIA H200", "cuda"), ("exit 9", "cpu"), ("true", "cpu")):
        program.write_text(f"#!/bin/sh\n{printed}\n")
        program.chmod(0o755)
        monkeypatch.setattr(module.shutil, "which", lambda name: str(program))
        assert machine_kind() == kind, printed
    driver = tmp_path / "version"
    driver.touch()
    monkeypatch.setattr(module, "_DRIVER", driver)
    assert machine_kind() == "cuda"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert machine_kind() == "cpu"


# --- Finding ------------------------------------------------------------------------------------


def test_environment_is_found_only_if_it_is_of_this_version_kind_and_works(make: Make) -> None:
    assert find("vllm", "cpu") is None
    make("vllm-cpu", current=False)
    make("vllm-cpu", version="3.12", works=False)
    make("sglang-cpu")
    assert find("vllm", "cpu") is None
    assert find("vllm", "cuda") is None
    path = make("vllm-cpu", version="3.13")
    found = find("vllm", "cpu")
    assert found is not None
    assert found.path == path
    assert found.versions() == {"engine": "1.2.3", "torch": "2.0.0+cpu"}


def test_environment_of_the_controllers_python_comes_first(make: Make) -> None:
    ours = make("unsloth-cpu")
    others: list[Path] = []
    while not any(other.name < ours.name for other in others):  # one that is listed before ours
        others.append(make("unsloth-cpu", version=f"3.{90 + len(others)}"))
    found = find("unsloth", "cpu")
    assert found is not None
    assert found.path == ours
    assert len(installed()) == len(others) + 1


def test_half_made_and_foreign_folders_are_no_environments(make: Make) -> None:
    path = make("vllm-cpu")
    (path.parent / f".{path.name}.partial").mkdir()
    (path.parent / "vllm-cpu-backup").mkdir()
    (path.parent / "other-cpu-0123456789ab").mkdir()
    (path.parent / f".{path.name}.lock").touch()
    assert [one.path for one in installed()] == [path]


def test_stated_interpreter_wins_and_nothing_is_looked_up(make: Make) -> None:
    make("vllm-cpu")
    assert engine_python("vllm", "generation", "python3") == "python3"
    with pytest.raises(ConfigError, match=r"scoring\.python is null.*engines install sglang`"):
        engine_python("sglang", "scoring", None)


def test_missing_engine_says_that_an_old_environment_is_there(make: Make) -> None:
    old = make("sglang-cpu", current=False)
    with pytest.raises(ConfigError, match=f"{old.name}: made by another version"):
        engine_python("sglang", "scoring", None)


def test_engine_is_the_one_of_the_machines_kind(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu, on_gpu = make("vllm-cpu"), make("vllm-cuda")
    assert engine_python("vllm", "generation", None) == str(on_cpu / "bin" / "python")
    monkeypatch.setattr(module, "machine_kind", lambda: "cuda")
    assert engine_python("vllm", "generation", None) == str(on_gpu / "bin" / "python")


# --- Removing -----------------------------------------------------------------------------------


def test_remove_takes_an_engine_a_kind_or_a_folder(make: Make) -> None:
    old, new, other = make("vllm-cpu", current=False), make("vllm-cpu"), make("sglang-cpu")
    on_gpu = make("vllm-cuda")
    assert [one.path for one in remove([old.name])] == [old]
    assert {one.path for one in remove(["vllm-cpu"])} == {new}
    assert {one.path for one in remove(["vllm"])} == {on_gpu}
    assert [one.path for one in installed()] == [other]
    assert not [path for path in other.parent.iterdir() if path.name.endswith(".removed")]


def test_an_unknown_name_removes_nothing(make: Make) -> None:
    path = make("vllm-cpu")
    with pytest.raises(ConfigError, match=f"no environment 'vlm' in .*there are: {path.name}"):
        remove(["vllm", "vlm"])
    assert path.exists()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_an_environment_in_use_is_not_removed(make: Make) -> None:
    path = make("vllm-cpu")
    command = [str(path / "bin" / "python"), "-S", "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ConfigError, match=f"in use by process {process.pid}"):
            remove(["vllm"])
        assert path.exists()
        process.communicate(b"\n")
    remove(["vllm"])
    assert not path.exists()


# --- Commands -----------------------------------------------------------------------------------


def test_list_shows_versions_states_and_what_is_not_made(make: Make) -> None:
    paths = [
        make("vllm-cpu"),
        make("sglang-cpu", current=False),
        make("unsloth-cpu", works=False),
        make("transformers4-cpu"),
    ]
    result = call_cli("engines", "list")
    assert (result.code, result.err) == (0, "")
    rows = {line.split()[-1]: line for line in result.out.splitlines()}
    for path, state in zip(
        paths, ("made ", "made by another version", "its Python is gone", "made "), strict=True
    ):
        assert state in rows[path.name]
        assert "2.0.0+cpu" in rows[path.name]
    missing = [line.split()[0] for line in result.out.splitlines() if "not made" in line]
    assert missing == ["sglang", "unsloth"]
    assert "this machine uses: cpu" in result.out


def test_install_finds_what_is_made_and_says_that_there_is_no_driver(make: Make) -> None:
    paths = {engine: make(f"{engine}-cpu") for engine in ("vllm", "sglang", "unsloth")}
    result = call_cli("engines", "install", "--python", sys.executable)
    assert result.code == 0, result.err
    assert result.out.splitlines() == [f"{k}: {v / 'bin' / 'python'}" for k, v in paths.items()]
    assert "no NVIDIA driver is seen" in result.err
    assert "CUDA builds" in result.err
    result = call_cli("engines", "install", "sglang", "--kind", "cpu")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [f"sglang: {paths['sglang'] / 'bin' / 'python'}"]


@pytest.mark.usefixtures("make")
def test_install_refuses_what_is_no_engine_and_an_old_python(tmp_path: Path) -> None:
    result = call_cli("engines", "install", "vlm")
    assert result.code == 2
    assert "no engine 'vlm'; expected any of vllm, sglang, unsloth" in result.err
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\necho 3 10 linux-x86_64\n")
    old.chmod(0o755)
    result = call_cli("engines", "install", "vllm", "--python", str(old))
    assert result.code == 2
    assert "Python 3.10" in result.err
    assert installed() == []
