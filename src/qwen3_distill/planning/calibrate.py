"""Measures a device in about a minute: products, memory bandwidth, decode-like reads, launches.

Each figure is the best of several rounds: what the device can do, not what disturbs it. Nothing of
this package's engines runs. `planning.rates` turns the figures into rates of the time plan.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal

import torch

from qwen3_distill.errors import ConfigError
from qwen3_distill.planning.calibration import Calibration, cpu_name
from qwen3_distill.planning.gpu import detect_gpu

_ROUNDS = 5
_DECODE_ROWS = 16
_TINY = 1000
"""Kernels of one element that are launched in a row."""
_MEASUREMENTS = 7


@dataclass(frozen=True)
class _Sizes:
    """How large the measured work is."""

    matrix: int
    """Rows and columns of the products' matrices."""
    copy_bytes: int
    weight_bytes: int
    """Weights of the decode-like chain: more than a cache holds."""
    width: int
    """Rows and columns of one of its matrices."""


_GPU = _Sizes(8192, 2**30, 2**31, 8192)
_SMALL_GPU = _Sizes(4096, 2**27, 2**28, 4096)
"""For less than 8 GiB of free memory."""
_CPU = _Sizes(1024, 2**27, 2**28, 2048)


def choose_device(asked: Literal["auto", "cuda", "cpu"]) -> torch.device:
    """Return the device to measure; ``auto``: the first GPU, or the CPU of a machine without one.

    Raises:
        ConfigError: a GPU is there or asked for, and this Python's PyTorch cannot use it.
    """
    if asked == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    gpu = detect_gpu()
    if asked == "cuda" or gpu is not None:
        seen = f"the driver shows {gpu.name}" if gpu else "no NVIDIA driver is seen"
        raise ConfigError(
            f"{seen}, and PyTorch {torch.__version__} of this Python finds no CUDA device; install "
            "a PyTorch with CUDA here, or measure the CPU with --device cpu"
        )
    return torch.device("cpu")


def calibrate(device: torch.device, seconds: float, say: Callable[[str], None]) -> Calibration:
    """Measure a device.

    Args:
        seconds: about how long it may take in all.
        say: called with every result as soon as it is there.
    """
    on_gpu = device.type == "cuda"
    sizes = _sizes(device)
    meter = _Meter(device, seconds / _MEASUREMENTS)
    name = torch.cuda.get_device_name(device) if on_gpu else cpu_name()
    say(f"{name}: about {seconds:.0f} s" if on_gpu else f"a CPU, {name}: about {seconds:.0f} s")

    def tell(what: str, value: float | None, unit: str) -> float | None:
        say(f"  {what:34} {'not available' if value is None else f'{value:,.4g} {unit}'}")
        return value

    bf16 = _product_tflops(meter, sizes.matrix, torch.bfloat16)
    tell("bf16 products", bf16, "TFLOP/s")
    fp8 = tell("FP8 products", _fp8_tflops(meter, sizes.matrix) if on_gpu else None, "TFLOP/s")
    fp32 = _product_tflops(meter, sizes.matrix, torch.float32)
    tell("float32 products", fp32, "TFLOP/s")
    bandwidth = _copy_gbs(meter, sizes.copy_bytes)
    tell("memory, copies", bandwidth, "GB/s read and written")
    decode = _decode_gbs(meter, sizes)
    tell(f"weights read with {_DECODE_ROWS} rows", decode, "GB/s")
    launch = _launch_us(meter)
    tell("a kernel launched", launch, "us")
    graph = tell("a kernel in a CUDA graph", _graph_us(meter) if on_gpu else None, "us")
    return Calibration(
        device=name,
        kind=device.type,
        measured_at=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        torch=torch.__version__,
        bf16_tflops=bf16,
        fp8_tflops=fp8,
        fp32_tflops=fp32,
        bandwidth_gbs=bandwidth,
        decode_gbs=decode,
        launch_us=launch,
        graph_kernel_us=graph,
    )


def _sizes(device: torch.device) -> _Sizes:
    if device.type == "cpu":
        return _CPU
    free, _ = torch.cuda.mem_get_info(device)
    return _GPU if free >= 8 * 2**30 else _SMALL_GPU


class _Meter:
    """Times a piece of work on a device."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self._seconds = seconds

    def best_s(self, work: Callable[[], Any]) -> float:
        """Return the seconds of one call of ``work``, the best of several rounds.

        Fewer rounds where a call takes long: the products of a CPU without bfloat16 take seconds.
        """
        first = self._time(work, 1)
        if first >= self._seconds:
            return first
        once = max(1e-7, self._time(work, 1))  # the first may have compiled something
        calls = max(1, int(self._seconds / _ROUNDS / once))
        rounds = min(_ROUNDS, max(1, int(self._seconds / (calls * once))))
        return min(self._time(work, calls) for _ in range(rounds))

    def tensor(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return random values: products of zeros draw less power, and may run faster."""
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype)

    def _time(self, work: Callable[[], Any], calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            work()
        self._wait()
        return (time.perf_counter() - began) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _product_tflops(meter: _Meter, size: int, dtype: torch.dtype) -> float:
    one, other = (meter.tensor(size, size, dtype=dtype) for _ in range(2))
    out = torch.empty_like(one)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        seconds = meter.best_s(lambda: torch.matmul(one, other, out=out))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / seconds / 1e12


def _fp8_tflops(meter: _Meter, size: int) -> float | None:
    """Measure FP8 products with a scale per row; None where the device or PyTorch has none."""
    one = meter.tensor(size, size, dtype=torch.float8_e4m3fn)
    other = meter.tensor(size, size, dtype=torch.float8_e4m3fn).t()
    rows = torch.ones(size, 1, device=meter.device)

    def product() -> torch.Tensor:
        return torch._scaled_mm(one, other, rows, rows.t(), out_dtype=torch.bfloat16)  # type: ignore[attr-defined]

    try:
        return 2 * size**3 / meter.best_s(product) / 1e12
    except (RuntimeError, ValueError, NotImplementedError):
        return None


def _copy_gbs(meter: _Meter, num_bytes: int) -> float:
    source = meter.tensor(num_bytes // 4, dtype=torch.float32)
    target = torch.empty_like(source)
    return 2 * num_bytes / meter.best_s(lambda: target.copy_(source)) / 1e9


def _decode_gbs(meter: _Meter, sizes: _Sizes) -> float:
    """Measure a chain of layers with few rows, which is bound by reading their weights."""
    width = sizes.width
    count = max(2, sizes.weight_bytes // (2 * width * width))
    layers = [meter.tensor(width, width, dtype=torch.bfloat16) for _ in range(count)]
    rows = meter.tensor(_DECODE_ROWS, width, dtype=torch.bfloat16)

    def chain() -> None:
        for layer in layers:
            torch.matmul(rows, layer)

    return 2 * width * width * count / meter.best_s(chain) / 1e9


def _launch_us(meter: _Meter) -> float:
    value = torch.zeros(1, device=meter.device)

    def launch() -> None:
        for _ in range(_TINY):
            value.add_(1)

    return meter.best_s(launch) / _TINY * 1e6


def _graph_us(meter: _Meter) -> float:
    value = torch.zeros(1, device=meter.device)
    graph = torch.cuda.CUDAGraph()
    value.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(_TINY):
            value.add_(1)
    return meter.best_s(graph.replay) / _TINY * 1e6


def quick_speed(device: torch.device) -> tuple[float, float]:
    """Measure copies (GB/s) and bfloat16 products (TFLOP/s) for about two seconds in all."""
    meter = _Meter(device, 1.0)
    return _copy_gbs(meter, _SMALL_GPU.copy_bytes), _product_tflops(
        meter, _SMALL_GPU.matrix, torch.bfloat16
    )
