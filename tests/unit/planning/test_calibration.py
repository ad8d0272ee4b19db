"""Peak figures, calibrations, and which of them a plan takes."""

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from qwen3_distill.errors import ConfigError
from qwen3_distill.pipeline.device_check import judged
from qwen3_distill.pipeline.finding import Status
from qwen3_distill.planning import calibrate as calibrate_module
from qwen3_distill.planning import device_rates, speed_probe
from qwen3_distill.planning.calibrate import calibrate, choose_device
from qwen3_distill.planning.calibration import (
    Calibration,
    calibration_file,
    cpu_name,
    load_calibration,
    save_calibration,
)
from qwen3_distill.planning.device_rates import UnknownDevice, rates_here, rates_of
from qwen3_distill.planning.device_speed import Speed, slow_parts
from qwen3_distill.planning.gpu import Gpu
from qwen3_distill.planning.peaks import DEVICES, find_device, named_device
from qwen3_distill.planning.rates import (
    EFFICIENCY,
    FITTED_ON,
    REFERENCE_BF16,
    REFERENCE_DECODE,
    REFERENCE_GRAPH_KERNEL,
    REFERENCE_LAUNCH,
    calibrated_rates,
    peak_rates,
)

GB10 = named_device("gb10")
MEASURED = Calibration(
    device="NVIDIA GB10",
    kind="cuda",
    measured_at="2026-11-28 12:00 UTC",
    torch="2.11.0",
    bf16_tflops=80.0,
    fp8_tflops=None,
    fp32_tflops=20.0,
    bandwidth_gbs=215.0,
    decode_gbs=220.0,
    launch_us=8.0,
    graph_kernel_us=2.5,
)


# --- The table ----------------------------------------------------------------------------------


def test_every_device_is_complete_and_named_once() -> None:
    wanted = {"gb10", "h100-sxm", "h100-pcie", "h200", "a100-sxm", "l40s", "rtx-5090", "b200"}
    assert wanted <= {device.key for device in DEVICES}
    assert len({device.key for device in DEVICES}) == len(DEVICES)
    for device in DEVICES:
        assert device.source
        for field in fields(device):
            value = getattr(device, field.name)
            if isinstance(value, float | int) and not isinstance(value, bool):
                assert value > 0, (device.key, field.name)
        assert device.fp8_tflops is None or device.fp8_tflops == pytest.approx(
            2 * device.bf16_tflops, rel=0.02
        )
        assert named_device(device.key) is device


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA GB10", "gb10"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_names_of_the_driver_find_their_device_and_no_other(name: str, key: str | None) -> None:
    matching = [device.key for device in DEVICES if find_device(name) is device]
    assert matching == ([] if key is None else [key])


def test_unknown_name_says_what_is_known_and_how_to_measure() -> None:
    with pytest.raises(ConfigError, match=r"--device gtx.*expected one of gb10.*calibrate"):
        rates_of("gtx")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("A100", r"did you mean a100-sxm or a100-pcie or a100-40gb\?"),
        ("a100", r"did you mean a100-sxm or a100-pcie or a100-40gb\?"),
        ("L40", r"did you mean l40s\?"),
        ("rtx5090", r"did you mean rtx-5090"),
    ],
)
def test_name_that_is_nearly_known_names_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"--device {typed}: .*{meant}"):
        rates_of(typed)


def test_names_are_known_in_any_case_and_an_empty_one_is_near_to_nothing() -> None:
    for typed in ("h100", "H100", "H100-SXM", " A100-Sxm ", "GB10"):
        assert rates_of(typed).name.startswith(typed.strip()[:4].upper())
    with pytest.raises(ConfigError, match="are not known; expected"):
        rates_of("")


def test_every_share_says_what_it_was_fitted_on() -> None:
    assert {field.name for field in fields(EFFICIENCY)} == set(FITTED_ON)


# --- Files --------------------------------------------------------------------------------------


def test_calibration_is_read_back(tmp_path: Path) -> None:
    assert load_calibration("NVIDIA GB10", tmp_path) is None
    file = save_calibration(MEASURED, tmp_path / "new")
    assert file == calibration_file("NVIDIA GB10", tmp_path / "new")
    assert load_calibration("NVIDIA GB10", tmp_path / "new") == MEASURED


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"schema": 2}, "schema is 2"),
        ({"bf16_tflops": 0}, "bf16_tflops"),
        ({"bf16_tflops": "80"}, "bf16_tflops"),
        ({"bandwidth_gbs": None}, "bandwidth_gbs"),
        ({"launch_us": True}, "launch_us"),
        ({"device": 7}, "device"),
    ],
)
def test_damaged_calibration_is_refused(
    tmp_path: Path, change: dict[str, object], word: str
) -> None:
    file = save_calibration(MEASURED, tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=rf"{word}.*calibrate"):
        load_calibration("NVIDIA GB10", tmp_path)
    file.write_text("{")
    with pytest.raises(ConfigError, match="calibrate"):
        load_calibration("NVIDIA GB10", tmp_path)


# --- Which rates --------------------------------------------------------------------------------


def gpu(name: str) -> Gpu:
    return Gpu(name=name, driver="580.1", capability=(12, 1), memory="[N/A]")


def test_a_calibrated_device_is_taken_as_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_rates, "detect_gpu", lambda: gpu("NVIDIA GB10"))
    assert rates_here(tmp_path) == peak_rates(GB10)
    save_calibration(MEASURED, tmp_path)
    found = rates_here(tmp_path)
    assert found.calibrated
    assert "2026-11-28" in found.origin
    assert found.bf16_flops == pytest.approx(80e12 / REFERENCE_BF16)
    assert found.weight_bandwidth == pytest.approx(220e9 / REFERENCE_DECODE)
    assert found.launch_s == pytest.approx(8e-6 / REFERENCE_LAUNCH)
    assert found.graph_kernel_s == pytest.approx(2.5e-6 / REFERENCE_GRAPH_KERNEL)
    assert found.fp8_flops is None
    assert found.unified


def test_unknown_gpu_and_uncalibrated_cpu_are_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_rates, "detect_gpu", lambda: gpu("NVIDIA XYZ"))
    with pytest.raises(UnknownDevice, match=r"NVIDIA XYZ are not known.*calibrate.*--device gb10"):
        rates_here(tmp_path)
    monkeypatch.setattr(device_rates, "detect_gpu", lambda: None)
    with pytest.raises(UnknownDevice, match=r"no GPU here.*calibrate"):
        rates_here(tmp_path)
    save_calibration(replace(MEASURED, device=cpu_name(), kind="cpu"), tmp_path)
    found = rates_here(tmp_path)
    assert found.name == cpu_name()
    save_calibration(
        replace(MEASURED, device=cpu_name(), kind="cpu", graph_kernel_us=None), tmp_path
    )
    assert rates_here(tmp_path).graph_kernel_s == found.launch_s  # every kernel is launched


def test_a_device_that_reaches_what_the_reference_does_has_its_peaks() -> None:
    h200 = named_device("h200")
    measured = replace(MEASURED, bf16_tflops=REFERENCE_BF16 * h200.bf16_tflops)
    assert calibrated_rates(measured).bf16_flops == pytest.approx(peak_rates(h200).bf16_flops)
    for device, hopper in (("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", False)):
        assert calibrated_rates(replace(measured, device=device)).hopper is hopper


# --- Measuring ----------------------------------------------------------------------------------


def test_cpu_is_measured_and_says_so() -> None:
    lines: list[str] = []
    found = calibrate(torch.device("cpu"), 0.1, lines.append)
    assert (found.kind, found.device) == ("cpu", cpu_name())
    assert (found.fp8_tflops, found.graph_kernel_us) == (None, None)
    for name in ("bf16_tflops", "fp32_tflops", "bandwidth_gbs", "decode_gbs", "launch_us"):
        value = getattr(found, name)
        assert math.isfinite(value)
        assert value > 0
    assert lines[0].startswith("a CPU")
    assert sum("not available" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("each_s", "calls"),
    [(5.0, 1), (1.0, 1), (0.4, 4), (0.25, 6), (0.01, 2 + 5 * 20)],
    ids=["longer_than_there_is", "all_of_it", "two_rounds", "four_rounds", "five_rounds_of_twenty"],
)
def test_a_slow_device_is_measured_in_fewer_rounds(
    each_s: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a call takes, all of them take little longer than one second."""
    now, done = 0.0, 0

    def work() -> None:
        nonlocal now, done
        now, done = now + each_s, done + 1

    monkeypatch.setattr(calibrate_module.time, "perf_counter", lambda: now)
    meter = calibrate_module._Meter(torch.device("cpu"), 1.0)
    assert meter.best_s(work) == pytest.approx(each_s)
    assert done == calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_pytorch_cannot_use_is_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu").type == "cpu"
    monkeypatch.setattr(calibrate_module, "detect_gpu", lambda: None)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="no NVIDIA driver"):
        choose_device("cuda")
    monkeypatch.setattr(calibrate_module, "detect_gpu", lambda: gpu("NVIDIA GB10"))
    with pytest.raises(ConfigError, match=r"shows NVIDIA GB10.*--device cpu"):
        choose_device("auto")


# --- The doctor's look --------------------------------------------------------------------------

GOOD = Speed(copy_gbs=215, bf16_tflops=80, clock_mhz=2400, highest_mhz=3003)


def test_clock_is_asked_for_under_load_not_while_cuda_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    class Timer:
        def __init__(self, seconds: float, ask: Callable[[], None]) -> None:
            self.start, self.join = lambda: done.append("timer"), ask

    def load(_: torch.device) -> tuple[float, float]:
        done.append("load")
        return 215.0, 80.0

    monkeypatch.setattr(speed_probe, "choose_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(speed_probe, "_wake", lambda _: done.append("CUDA"))
    monkeypatch.setattr(speed_probe, "quick_speed", load)
    monkeypatch.setattr(speed_probe, "_clocks", lambda: (2400.0, 3003.0))
    monkeypatch.setattr(speed_probe.threading, "Timer", Timer)
    speed_probe.main()
    assert done == ["CUDA", "timer", "load"]
    assert Speed(**json.loads(capsys.readouterr().out)) == GOOD


def test_a_device_in_order_passes_and_a_slow_one_is_named() -> None:
    assert slow_parts(GOOD, GB10) == []
    assert judged("NVIDIA GB10", GOOD).status is Status.PASS
    for change, words in (
        ({"copy_gbs": 120.0}, "copies reach 120 GB/s"),
        ({"bf16_tflops": 30.0}, "30 TFLOP/s"),
        ({"clock_mhz": 850.0}, "850 of 3,003 MHz"),
        ({"copy_gbs": 199.0}, "copies reach 199 GB/s, expected 200 or more"),
        ({"clock_mhz": 1990.0, "highest_mhz": None}, "1,990 MHz, expected 2,000 or more"),
    ):
        verdict = judged("NVIDIA GB10", replace(GOOD, **change))
        assert verdict.status is Status.WARN
        assert words in verdict.found
        assert verdict.change
    for fine in ({"copy_gbs": 201.0}, {"clock_mhz": 2090.0}):  # capped at 2,100
        assert slow_parts(replace(GOOD, **fine), GB10) == []
    assert slow_parts(replace(GOOD, clock_mhz=None, highest_mhz=None), None) == []
    h200 = Speed(copy_gbs=3000, bf16_tflops=600, clock_mhz=1400, highest_mhz=1980)
    assert slow_parts(h200, named_device("h200")) == []
    assert judged("NVIDIA GB10", "it was not measured: no CUDA").status is Status.SKIP
