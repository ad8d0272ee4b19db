"""Chooses the rates of the time plan: a device that was named, or the one here."""

from pathlib import Path

from qwen3_distill.errors import ConfigError
from qwen3_distill.planning.calibration import cpu_name, load_calibration
from qwen3_distill.planning.gpu import detect_gpu
from qwen3_distill.planning.peaks import DEVICES, find_device, named_device
from qwen3_distill.planning.rates import Rates, calibrated_rates, peak_rates

_CALIBRATE = "run `qwen3-distill calibrate` here (a minute)"


class UnknownDevice(ConfigError):
    """Nothing is known of how fast the device here is."""


def rates_of(key: str) -> Rates:
    """Return the data sheet's rates of a named device.

    Raises:
        ConfigError: the device is not known.
    """
    return peak_rates(named_device(key))


def rates_here(folder: Path | None = None) -> Rates:
    """Return the rates of this machine: as calibrated, or of its GPU's data sheet.

    Args:
        folder: of the calibrations; default: the user's cache.

    Raises:
        UnknownDevice: nothing is known of it; says what to do.
        ConfigError: its calibration is damaged.
    """
    gpu = detect_gpu()
    name = cpu_name() if gpu is None else gpu.name
    measured = load_calibration(name, folder)
    if measured is not None:
        return calibrated_rates(measured)
    known = ", ".join(device.key for device in DEVICES)
    if gpu is None:
        raise UnknownDevice(
            f"no time is planned: there is no GPU here, and this CPU ({name}) was not calibrated; "
            f"{_CALIBRATE}, or name the device of the run: --device {known}"
        )
    device = find_device(gpu.name)
    if device is None:
        raise UnknownDevice(
            f"no time is planned: the peak figures of {gpu.name} are not known; {_CALIBRATE}, or "
            f"name a like device: --device {known}"
        )
    return peak_rates(device)
