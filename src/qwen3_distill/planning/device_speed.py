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
"""Share of the data sheet's bandwidth that a copy reaches at least on a device in order. Others
measured 0.77 to 0.88 on a GB10."""
_LEAST_PRODUCTS = 0.4
_LEAST_CLOCK = 0.6
"""Share of the highest clock under load."""
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
    return Speed(**json.loads(done.stdout))


def slow_parts(speed: Speed, peaks: DevicePeaks | None) -> list[str]:
    """Return what is slower than a device in order: empty if nothing is."""
    found = []
    if peaks is not None:
        least = _LEAST_BANDWIDTH * peaks.bandwidth_gbs
        if speed.copy_gbs < least:
            found.append(f"copies reach {speed.copy_gbs:,.0f} GB/s, expected {least:,.0f} or more")
        least = _LEAST_PRODUCTS * peaks.bf16_tflops
        if speed.bf16_tflops < least:
            found.append(
                f"bfloat16 products reach {speed.bf16_tflops:,.0f} TFLOP/s, expected {least:,.0f} "
                "or more"
            )
    clock, highest = speed.clock_mhz, speed.highest_mhz
    if clock is not None and highest is not None and clock < _LEAST_CLOCK * highest:
        found.append(f"the clock under load is {clock:,.0f} of {highest:,.0f} MHz")
    return found
