"""Checks that the GPU is as fast as its kind: a throttled one says nothing, and wastes time."""

from collections.abc import Callable

from qwen3_distill.config import RunConfig
from qwen3_distill.pipeline.assembly.plan import all_embedded
from qwen3_distill.pipeline.finding import Status, Verdict, doubtful, good, skipped
from qwen3_distill.planning.device import is_unified_here
from qwen3_distill.planning.device_speed import Speed, measure_speed, slow_parts
from qwen3_distill.planning.gpu import detect_gpu
from qwen3_distill.planning.peaks import find_device

DEVICE_SPEED = "device speed"
"""Name of the check."""
_CHANGE = (
    "end what else uses the GPU; look at its temperature and power (nvidia-smi -q -d "
    "CLOCK,POWER,PERFORMANCE); a GB10 stuck at a low clock recovers when its power cable is pulled"
)


def check_speed() -> Verdict:
    """Measure the GPU's clock and bandwidth under a short load."""
    gpu = detect_gpu()
    if gpu is None:
        return skipped("there is no GPU here")
    return judged(gpu.name, measure_speed())


def judged(name: str, speed: Speed | str) -> Verdict:
    """Judge what was measured on a GPU; a text says why nothing was."""
    if isinstance(speed, str):
        return skipped(speed)
    slow = slow_parts(speed, find_device(name))
    found = f"{name}: copies {speed.copy_gbs:,.0f} GB/s, bf16 {speed.bf16_tflops:,.0f} TFLOP/s"
    if speed.clock_mhz is not None:
        found += f", clock {speed.clock_mhz:,.0f} MHz"
    return doubtful(f"{found}: {', '.join(slow)}", _CHANGE) if slow else good(found)


def speed_notes(config: RunConfig, say: Callable[[str], None]) -> list[str]:
    """Warn of a slow GPU before engines take the memory, where CPU and GPU share one.

    Such machines are known to get stuck at a low clock. Where everything is embedded, or PyTorch
    cannot use the GPU, nothing is measured.
    """
    if all_embedded(config) or not is_unified_here():
        return []
    say("looking at the GPU's clock and bandwidth")
    verdict = check_speed()
    return [f"{DEVICE_SPEED}: {verdict.text}"] if verdict.status is Status.WARN else []
