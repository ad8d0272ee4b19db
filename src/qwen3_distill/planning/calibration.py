"""Keeps what `qwen3-distill calibrate` measured, one small file per device in the user's cache."""

import math
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qwen3_distill.errors import ConfigError
from qwen3_distill.utils.files import write_json_atomic
from qwen3_distill.utils.json_text import read_json_object
from qwen3_distill.utils.paths import cache_home
from qwen3_distill.utils.shown import shown

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The figures that one device reached, measured in about a minute."""

    device: str
    """Its name: the driver's, or the processor's with its threads."""
    kind: str
    """``cuda`` or ``cpu``."""
    measured_at: str
    """Date and time, UTC."""
    torch: str
    """Version of PyTorch."""
    bf16_tflops: float
    """Products of large bfloat16 matrices."""
    fp8_tflops: float | None
    """Products of large FP8 matrices with a scale per row; None: not available."""
    fp32_tflops: float
    """Products of large float32 matrices."""
    bandwidth_gbs: float
    """Bytes read and written per second by copies."""
    decode_gbs: float
    """Bytes of weights read per second by a decode-like chain of products with few rows."""
    launch_us: float
    """Microseconds from one launched kernel to the next."""
    graph_kernel_us: float | None
    """The same within a CUDA graph; None: there are none."""


def calibration_folder() -> Path:
    """Return the folder of the files; it may not exist."""
    return cache_home() / "qwen3-distill" / "calibration"


def calibration_file(device: str, folder: Path | None = None) -> Path:
    """Return the file of a device."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"
    return (folder or calibration_folder()) / f"{name}.json"


def save_calibration(measured: Calibration, folder: Path | None = None) -> Path:
    """Write a device's file, in place of an earlier one."""
    file = calibration_file(measured.device, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(file, {"schema": SCHEMA, **asdict(measured)})
    return file


def load_calibration(device: str, folder: Path | None = None) -> Calibration | None:
    """Read a device's file; None: it was not calibrated.

    Raises:
        ConfigError: the file is not what `calibrate` writes.
    """
    file = calibration_file(device, folder)
    try:
        values = read_json_object(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}; {_ADVICE}") from None
    return _checked(values, file)


_ADVICE = "remove it, or run `qwen3-distill calibrate` again, which replaces it"
_OPTIONAL = ("fp8_tflops", "graph_kernel_us")
_TEXTS = ("device", "kind", "measured_at", "torch")


def _checked(values: dict[str, Any], file: Path) -> Calibration:
    if values.get("schema") != SCHEMA:
        found = shown(values.get("schema"))
        raise ConfigError(f"{file}: schema is {found}, expected {SCHEMA}; {_ADVICE}")
    given: dict[str, Any] = {}
    for field in fields(Calibration):
        value = values.get(field.name)
        if field.name in _TEXTS:
            good = isinstance(value, str)
        elif value is None:
            good = field.name in _OPTIONAL
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            good = number and math.isfinite(value) and value > 0
        if not good:
            raise ConfigError(f"{file}: {field.name} is {shown(value)}; {_ADVICE}")
        given[field.name] = value
    return Calibration(**given)


def cpu_name() -> str:
    """Return the processor's name with the number of cores that this process may use."""
    model = "CPU"
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            model = value.strip()
            break
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return f"{model}, {cores} cores"
