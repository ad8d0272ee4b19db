"""Asks the NVIDIA driver what the first visible GPU is, without torch and without using the GPU."""

import os
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first GPU that CUDA shows."""

    name: str
    driver: str
    """Version of the driver, e.g. ``580.95.05``."""
    capability: tuple[int, int]
    """Compute capability, e.g. (9, 0)."""
    memory: str
    """Total memory as the driver writes it; no number where CPU and GPU share it."""


def detect_gpu() -> Gpu | None:
    """Return the first visible GPU; None without one, or without a driver that answers."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    fields = "name,driver_version,compute_cap,memory.total"
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader"]
    if visible:
        command.append(f"--id={visible.split(',')[0].strip()}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return parse_gpu(lines[0]) if lines else None


def parse_gpu(line: str) -> Gpu | None:
    """Parse a line of nvidia-smi; None if it is of another form."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 4:
        return None
    major, _, minor = fields[2].partition(".")
    if not (major.isdigit() and minor.isdigit()):
        return None
    return Gpu(
        name=fields[0], driver=fields[1], capability=(int(major), int(minor)), memory=fields[3]
    )
