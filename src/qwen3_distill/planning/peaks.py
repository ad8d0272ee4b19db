"""Holds what devices can do at most: matrix products, memory bandwidth, kernel launches.

The figures are those of the makers' data sheets, without sparsity. What a stage reaches of them is
in `planning.rates`.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches

from qwen3_distill.errors import ConfigError

TERA = 1e12
GIGA = 1e9
MICRO = 1e-6


@dataclass(frozen=True, kw_only=True)
class DevicePeaks:
    """The most that one device can do."""

    key: str
    """Its name on the command line: ``h100-sxm``."""
    label: str
    """Its name for people."""
    pattern: str
    """A regular expression that the driver's name of it contains; letter case does not matter."""
    bf16_tflops: float
    """Dense bfloat16 products with float32 sums."""
    fp8_tflops: float | None
    """Dense FP8 products with float32 sums; None: it has none, and FP8 weights are widened."""
    fp32_tflops: float
    """float32 products outside of the tensor cores."""
    bandwidth_gbs: float
    """Memory bandwidth in GB/s, reads and writes together."""
    graph_kernel_us: float
    """Time of a small kernel within a CUDA graph, in microseconds."""
    launch_us: float
    """Time of the host for one kernel that PyTorch launches, in microseconds."""
    source: str
    """Where the figures are from."""
    unified: bool = False
    """Whether CPU and GPU share one memory."""
    hopper: bool = False
    """Whether it has compute capability 9.0."""


_LAUNCHES = "launch times assumed"

DEVICES: tuple[DevicePeaks, ...] = (
    DevicePeaks(
        key="gb10",
        label="GB10 (DGX Spark)",
        pattern=r"\bGB10\b",
        bf16_tflops=125,
        fp8_tflops=250,
        fp32_tflops=29.7,
        bandwidth_gbs=273,
        graph_kernel_us=3.0,
        launch_us=10.0,
        source="NVIDIA DGX Spark data sheet: 273 GB/s, 1 PFLOP sparse FP4, of which dense FP8 is a "
        f"quarter and bf16 an eighth; fp32: huggingface.js PR 1861; {_LAUNCHES}",
        unified=True,
    ),
    DevicePeaks(
        key="h200",
        label="H200 SXM",
        hopper=True,
        pattern=r"\bH200\b(?!.*NVL)",
        bf16_tflops=989.4,
        fp8_tflops=1978.9,
        fp32_tflops=66.9,
        bandwidth_gbs=4800,
        graph_kernel_us=2.0,
        launch_us=6.0,
        source=f"NVIDIA H200 data sheet; {_LAUNCHES}",
    ),
    DevicePeaks(
        key="h200-nvl",
        label="H200 NVL",
        hopper=True,
        pattern=r"\bH200\b.*NVL",
        bf16_tflops=835.5,
        fp8_tflops=1671,
        fp32_tflops=60,
        bandwidth_gbs=4800,
        graph_kernel_us=2.0,
        launch_us=6.0,
        source=f"NVIDIA H200 data sheet; {_LAUNCHES}",
    ),
    DevicePeaks(
        key="h100-sxm",
        label="H100 SXM",
        hopper=True,
        pattern=r"\bH100\b(?!.*(?:PCIe|NVL))",
        bf16_tflops=989.4,
        fp8_tflops=1978.9,
        fp32_tflops=66.9,
        bandwidth_gbs=3350,
        graph_kernel_us=2.0,
        launch_us=6.0,
        source=f"NVIDIA H100 data sheet; {_LAUNCHES}",
    ),
    DevicePeaks(
        key="h100-pcie",
        label="H100 PCIe",
        hopper=True,
        pattern=r"\bH100\b.*PCIe",
        bf16_tflops=756,
        fp8_tflops=1513,
        fp32_tflops=51.2,
        bandwidth_gbs=2000,
        graph_kernel_us=2.0,
        launch_us=6.0,
        source=f"NVIDIA H100 PCIe product brief PB-11133 and data sheet; {_LAUNCHES}",
    ),
    DevicePeaks(
        key="h100-nvl",
        label="H100 NVL",
        hopper=True,
        pattern=r"\bH100\b.*NVL",
        bf16_tflops=835.5,
        fp8_tflops=1671,
        fp32_tflops=60,
        bandwidth_gbs=3900,
        graph_kernel_us=2.0,
        launch_us=6.0,
        source=f"NVIDIA H100 data sheet; {_LAUNCHES}",
    ),
    DevicePeaks(
        key="a100-sxm",
        label="A100 SXM 80 GB",
        pattern=r"\bA100\b.*SXM.*80",
        bf16_tflops=312,
        fp8_tflops=None,
        fp32_tflops=19.5,
        bandwidth_gbs=2039,
        graph_kernel_us=2.5,
        launch_us=6.0,
        source=f"NVIDIA A100 data sheet; {_LAUNCHES}",
    ),
    DevicePeaks(
        key="a100-pcie",
        label="A100 PCIe 80 GB",
        pattern=r"\bA100\b.*(?:80GB PCIe|PCIe.*80)",
        bf16_tflops=312,
        fp8_tflops=None,
        fp32_tflops=19.5,
        bandwidth_gbs=1935,
        graph_kernel_us=2.5,
        launch_us=6.0,
        source=f"NVIDIA A100 data sheet; {_LAUNCHES}",
    ),
    DevicePeaks(
        key="a100-40gb",
        label="A100 40 GB",
        pattern=r"\bA100\b.*40",
        bf16_tflops=312,
        fp8_tflops=None,
        fp32_tflops=19.5,
        bandwidth_gbs=1555,
        graph_kernel_us=2.5,
        launch_us=6.0,
        source=f"NVIDIA A100 data sheet; {_LAUNCHES}",
    ),
    DevicePeaks(
        key="l40s",
        label="L40S",
        pattern=r"\bL40S\b",
        bf16_tflops=362,
        fp8_tflops=733,
        fp32_tflops=91.6,
        bandwidth_gbs=864,
        graph_kernel_us=2.0,
        launch_us=6.0,
        source=f"NVIDIA L40S data sheet; {_LAUNCHES}",
    ),
    DevicePeaks(
        key="l4",
        label="L4",
        pattern=r"\bL4\b",
        bf16_tflops=121,
        fp8_tflops=242.5,
        fp32_tflops=30.3,
        bandwidth_gbs=300,
        graph_kernel_us=2.5,
        launch_us=6.0,
        source=f"NVIDIA L4 data sheet; {_LAUNCHES}",
    ),
    DevicePeaks(
        key="rtx-4090",
        label="GeForce RTX 4090",
        pattern=r"\bRTX 4090\b(?! (?:D|Laptop))",
        bf16_tflops=165.2,
        fp8_tflops=330.3,
        fp32_tflops=82.6,
        bandwidth_gbs=1008,
        graph_kernel_us=2.0,
        launch_us=6.0,
        source=f"NVIDIA Ada GPU architecture white paper, sums in float32; {_LAUNCHES}",
    ),
    DevicePeaks(
        key="rtx-5090",
        label="GeForce RTX 5090",
        pattern=r"\bRTX 5090\b(?! (?:D|Laptop))",
        bf16_tflops=209.5,
        fp8_tflops=419,
        fp32_tflops=104.8,
        bandwidth_gbs=1792,
        graph_kernel_us=2.0,
        launch_us=6.0,
        source=f"NVIDIA RTX Blackwell GPU architecture white paper, sums in float32; {_LAUNCHES}",
    ),
    DevicePeaks(
        key="b200",
        label="B200",
        pattern=r"(?<!G)\bB200\b",
        bf16_tflops=2250,
        fp8_tflops=4500,
        fp32_tflops=75,
        bandwidth_gbs=7700,
        graph_kernel_us=2.0,
        launch_us=6.0,
        source=f"NVIDIA HGX B200 data sheet, an eighth of the board; {_LAUNCHES}",
    ),
    DevicePeaks(
        key="gb200",
        label="GB200, one GPU",
        pattern=r"\bGB200\b",
        bf16_tflops=2500,
        fp8_tflops=5000,
        fp32_tflops=80,
        bandwidth_gbs=8000,
        graph_kernel_us=2.0,
        launch_us=8.0,
        source=f"NVIDIA GB200 NVL72 data sheet; {_LAUNCHES}",
    ),
)
"""Devices whose figures are known, each once."""


def find_device(name: str) -> DevicePeaks | None:
    """Return the device of a driver's name, e.g. ``NVIDIA H100 80GB HBM3``; None: unknown."""
    found = (device for device in DEVICES if re.search(device.pattern, name, re.IGNORECASE))
    return next(found, None)


def named_device(key: str) -> DevicePeaks:
    """Return the device of a name on the command line.

    Raises:
        ConfigError: there is none of this name.
    """
    typed = key.strip().lower()
    found = {device.key: device for device in DEVICES}.get(typed) or find_device(key)
    if found is None:
        known = [device.key for device in DEVICES]
        nearest = [one for one in known if one.startswith(typed)] if typed else []
        nearest = nearest or get_close_matches(typed, known)
        meant = f" (did you mean {' or '.join(nearest)}?)" if nearest else ""
        raise ConfigError(
            f"--device {key}: its peak figures are not known{meant}; expected one of "
            f"{', '.join(known)}. On the "
            "device itself `qwen3-distill calibrate` measures it in a minute, and `plan` without "
            "--device then uses what it measured"
        )
    return found
