"""Measures the GPU's clock, copies and products for two seconds, and prints them as JSON.

python -m qwen3_distill.planning.speed_probe
"""

import json
import subprocess
import sys
import threading

import torch

from qwen3_distill.errors import DistillError
from qwen3_distill.planning.calibrate import choose_device, quick_speed

_LOADED_AFTER_S = 0.7


def _clocks() -> tuple[float | None, float | None]:
    """Ask the driver for the clock now and the highest one."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm"]
    command.append("--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        now, highest = (field.strip() for field in done.stdout.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None, None
    return _number(now), _number(highest)


def _number(text: str) -> float | None:
    return float(text) if text.replace(".", "", 1).isdigit() else None


def _wake(device: torch.device) -> None:
    """Load CUDA, which takes as long as the load itself: the clock is asked for under load."""
    torch.zeros(1, device=device).item()


def main() -> None:
    """Measure and print; without a usable GPU, say why and exit with status 2."""
    clocks: list[tuple[float | None, float | None]] = []
    try:
        device = choose_device("cuda")
    except DistillError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    _wake(device)
    asking = threading.Timer(_LOADED_AFTER_S, lambda: clocks.append(_clocks()))
    asking.start()
    copy_gbs, bf16_tflops = quick_speed(device)
    asking.join()
    now, highest = clocks[0] if clocks else (None, None)
    record = {"copy_gbs": copy_gbs, "bf16_tflops": bf16_tflops}
    sys.stdout.write(json.dumps(record | {"clock_mhz": now, "highest_mhz": highest}))


if __name__ == "__main__":
    main()
