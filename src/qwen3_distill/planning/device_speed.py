"""Looks for two seconds at how fast the GPU here is: its clock under load, and its bandwidth.

A device that is throttled or stuck in a low-power state computes the same results several times
slower, and nothing else says so. `planning.speed_probe` measures in a process of its own, so that
its memory is free again before an engine starts.
"""

import json
import subprocess
import sys
from dataclasses import dataclass

from qwen3_distill.planning.peaks import DevicePeaks

_LEAST_BANDWIDTH = 0.6
"""Share of the data sheet's bandwidth that a copy reaches at least on a device in order."""
_LEAST_UNIFIED_BANDWIDTH = 200 / 273
"""The same of a GB10: others measured 209 GB/s in a fused norm (indrajeetadityaroy9/blackwell-gb10-
sm121-native-pytorch) and 218 in a kernel that streams (huggingface/kernels, PR 283), and decoding
implies 229 to 242."""
_LEAST_PRODUCTS = 0.4
_LEAST_CLOCK = 0.6
"""Share of the highest clock under load."""
_LEAST_UNIFIED_CLOCK_MHZ = 2000
"""Clock of a GB10 under load: others saw 2.2 to 2.5 GHz (djangodevreng/dgx-spark-benchmarks), say
to cap it at 2.1, and saw 0.5 to 0.85 on machines stuck in a low-power state (Blackwellboy/
model-serving-minefield, PR 55)."""
_TIMEOUT_S = 120


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The figures of a GPU under a short load."""

    copy_gbs: float
    bf16_tflops: float
    clock_mhz: float | None
    """Clock of its processors under load; None: the driver does not tell."""
    highest_mhz: float | None


def measure_speed() -> Speed | str:
    """Measure the first GPU in a process of its own; a text says why it was not measured."""
    command = [sys.executable, "-m", "qwen3_distill.planning.speed_probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        return f"it was not measured: {error}"
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return f"it was not measured: {last}"
    try:
        return Speed(**json.loads((done.stdout.strip().splitlines() or [""])[-1]))
    except (ValueError, TypeError) as error:  # a library printed something else
        return f"it was not measured: {error}"


def slow_parts(speed: Speed, peaks: DevicePeaks | None) -> list[str]:
    """Return what is slower than a device in order: empty if nothing is."""
    found = []
    unified = peaks is not None and peaks.unified
    if peaks is not None:
        share = _LEAST_UNIFIED_BANDWIDTH if unified else _LEAST_BANDWIDTH
        least = share * peaks.bandwidth_gbs
        if speed.copy_gbs < least:
            found.append(f"copies reach {speed.copy_gbs:,.0f} GB/s, expected {least:,.0f} or more")
        least = _LEAST_PRODUCTS * peaks.bf16_tflops
        if speed.bf16_tflops < least:
            found.append(
                f"bfloat16 products reach {speed.bf16_tflops:,.0f} TFLOP/s, expected {least:,.0f} "
                "or more"
            )
    clock, highest = speed.clock_mhz, speed.highest_mhz
    least = _LEAST_UNIFIED_CLOCK_MHZ if unified else _LEAST_CLOCK * (highest or 0.0)
    if clock is not None and clock < least:
        of = "" if highest is None else f" of {highest:,.0f}"
        found.append(f"the clock under load is {clock:,.0f}{of} MHz, expected {least:,.0f} or more")
    return found
