"""Measures the peak of the device's used memory, of all processes. Standard library only."""

import ctypes
import os
import threading
import time
from pathlib import Path
from types import TracebackType

INTERVAL_S = 0.05


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class Gpu:
    """The first visible GPU, read through the driver's library without using the GPU.

    Raises:
        OSError: there is no driver, or the device has no memory of its own.
    """

    def __init__(self) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._check(self._nvml.nvmlInit_v2())
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        self._handle = ctypes.c_void_p()
        if first.isdigit() or not first:
            index = ctypes.c_uint(int(first or 0))
            find = self._nvml.nvmlDeviceGetHandleByIndex_v2
            self._check(find(index, ctypes.byref(self._handle)))
        else:
            find = self._nvml.nvmlDeviceGetHandleByUUID
            self._check(find(first.encode(), ctypes.byref(self._handle)))
        self.used_bytes()

    def used_bytes(self) -> int:
        memory = _Memory()
        self._check(self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)))
        return memory.used

    @staticmethod
    def _check(status: int) -> None:
        if status != 0:
            raise OSError(f"NVML status {status}")


class Machine:
    """The machine's memory, for machines without a GPU or with one that shares it."""

    def used_bytes(self) -> int:
        values = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(values[k].split()[0]) for k in ("MemTotal", "MemAvailable"))
        return (total - available) * 1024


def device() -> Gpu | Machine:
    """Return the device whose memory the engines use."""
    try:
        return Gpu()
    except OSError:
        return Machine()


class PeakMemory:
    """Samples the used bytes in a thread; gives their peak above the bytes used at the begin.

    Args:
        before_bytes: what counts as used before; default: what is used now.
    """

    def __init__(self, before_bytes: int | None = None) -> None:
        self._device = device()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.before_bytes = self._device.used_bytes() if before_bytes is None else before_bytes
        self._peak_bytes = self._device.used_bytes()

    @property
    def peak_gib(self) -> float:
        """Highest sample so far, minus the bytes used before."""
        return (self._peak_bytes - self.before_bytes) / 2**30

    def restart(self) -> None:
        """Forget the samples so far; keep the bytes used before."""
        self._peak_bytes = self._device.used_bytes()

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.is_set():
            self._peak_bytes = max(self._peak_bytes, self._device.used_bytes())
            time.sleep(INTERVAL_S)
