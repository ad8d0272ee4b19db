"""Asks driver and system how much memory is free, without torch and without using the GPU."""

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qwen3_distill.errors import ConfigError
from qwen3_distill.planning.peaks import find_device

_MEMINFO = Path("/proc/meminfo")
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """The memory that the engines share."""

    kind: Literal["cuda", "unified", "cpu"]
    """``unified``: GPU and CPU share one memory."""
    name: str
    free_bytes: int
    """Bytes that can be allocated now."""


def stated_memory(free_bytes: int, *, unified: bool = False) -> DeviceMemory:
    """A GPU of which only the memory is known, and whether the CPU shares it."""
    if unified:
        name = "as stated, shared with the CPU"
        return DeviceMemory(kind="unified", name=name, free_bytes=free_bytes)
    return DeviceMemory(kind="cuda", name="as stated", free_bytes=free_bytes)


def memory_to_plan(stated_bytes: int | None = None, *, unified: bool | None = None) -> DeviceMemory:
    """Return the memory that a plan divides.

    Args:
        stated_bytes: default: what is free here now.
        unified: whether GPU and CPU of the planned device share one memory; default: as the first
            GPU here. Where they do, every process's host side counts, and offloading frees nothing.

    Raises:
        ConfigError: nothing is stated, and neither the driver nor the system reports the memory.
    """
    if stated_bytes is not None:
        shared = is_unified_here() if unified is None else unified
        return stated_memory(stated_bytes, unified=shared)
    found = detect_memory()
    if unified is None:
        return found
    return replace(found, kind="unified" if unified else "cuda")


def is_unified_here() -> bool:
    """Return whether the first visible GPU shares the machine's memory."""
    gpu = _first_gpu()
    return gpu is not None and _shares_memory(*gpu)


def _shares_memory(name: str, free_bytes: int | None) -> bool:
    """Whether a GPU has no memory of its own: its driver reports none, or its kind has none."""
    known = find_device(name)
    return free_bytes is None or (known is not None and known.unified)


def detect_memory() -> DeviceMemory:
    """Return the free memory of the first visible GPU, or of the machine without one.

    Raises:
        ConfigError: neither the driver nor the system reports the memory.
    """
    gpu = _first_gpu()
    if gpu is None:
        return DeviceMemory(kind="cpu", name="this machine's memory", free_bytes=available_bytes())
    name, free = gpu
    if free is None or _shares_memory(name, free):
        # The driver's free memory would not count what the page cache holds and gives back.
        return DeviceMemory(kind="unified", name=name, free_bytes=available_bytes())
    return DeviceMemory(kind="cuda", name=name, free_bytes=free)


def _first_gpu() -> tuple[str, int | None] | None:
    """Name and free bytes of the first GPU that CUDA shows; None without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    if visible:
        command.append(f"--id={visible.split(',')[0].strip()}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_gpu_line(done.stdout.strip().splitlines()[0]) if done.stdout.strip() else None


def parse_gpu_line(line: str) -> tuple[str, int | None]:
    """Parse nvidia-smi's ``name, free MiB``; the memory is None if it is not a number."""
    name, _, free = line.rpartition(",")
    free = free.strip()
    return name.strip(), int(free) * _MIB if free.isdigit() else None


def available_bytes() -> int:
    """Bytes that Linux can give without swapping: free ones and those that caches can release."""
    try:
        text = _MEMINFO.read_text(encoding="ascii")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise ConfigError(
        "cannot find out how much memory this machine has (no nvidia-smi, no MemAvailable in "
        f"{_MEMINFO}); set planning.device_memory_gib"
    )
