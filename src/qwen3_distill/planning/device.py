"""Asks driver and system how much memory is free, without torch and without using the GPU."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen3_distill.errors import ConfigError

_MEMINFO = Path("/proc/meminfo")
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """The memory that the engines share."""

    kind: Literal["cuda", "unified", "cpu", "stated"]
    """``unified``: GPU and CPU share one memory. ``stated``: by the config or the caller."""
    name: str
    free_bytes: int
    """Bytes that can be allocated now."""


def stated_memory(free_bytes: int) -> DeviceMemory:
    """A device of which only the memory is known."""
    return DeviceMemory(kind="stated", name="as stated", free_bytes=free_bytes)


def detect_memory() -> DeviceMemory:
    """Return the free memory of the first visible GPU, or of the machine without one.

    Raises:
        ConfigError: neither the driver nor the system reports the memory.
    """
    gpu = _first_gpu()
    if gpu is None:
        return DeviceMemory(kind="cpu", name="this machine's memory", free_bytes=available_bytes())
    name, free = gpu
    if free is None:
        # A GPU without a memory of its own. The driver's free memory would not count what the page
        # cache holds and gives back.
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
