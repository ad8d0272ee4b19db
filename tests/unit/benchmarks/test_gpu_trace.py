"""Kernels of a GPU's trace are added up, by name and by what they do."""

import pytest

from benchmarks.lib.gpu_trace import added_up, category, idle_share, milliseconds

MARKS = {"attention": ("flash",), "products": ("gemm", "flash_gemm")}


def event(name: str, start: float, length: float, kind: str = "kernel") -> dict[str, object]:
    return {"name": name, "ts": start, "dur": length, "cat": kind}


def test_kernels_that_overlap_keep_the_gpu_busy_once() -> None:
    work = added_up(
        [
            event("gemm", 150.0, 100.0),
            event("flash", 100.0, 100.0),
            event("copy", 350.0, 50.0, "gpu_memcpy"),
            event("launch", 0.0, 1000.0, "cuda_runtime"),  # the host's
            {"name": "mark", "ts": 5.0, "cat": "kernel"},
        ]
    )
    assert work["kernels"] == {"flash": [1, 100.0], "gemm": [1, 100.0], "copy": [1, 50.0]}
    assert work["span_us"] == 300.0
    assert work["busy_us"] == 200.0
    assert idle_share(work) == pytest.approx(1 / 3)


def test_without_work_a_gpu_is_idle() -> None:
    assert idle_share(added_up([])) == 1


def test_the_first_category_counts() -> None:
    names = ("Flash_GEMM", "some_gemm", "memcpy")
    assert [category(name, MARKS) for name in names] == ["attention", "products", "other"]


def test_milliseconds_are_those_of_a_unit() -> None:
    work = added_up([event("gemm_a", at, 500.0) for at in (0.0, 1000.0)] + [event("z", 9e3, 100.0)])
    found = milliseconds(work, MARKS, units=2, largest=1)
    assert found["category_ms"] == {"other": 0.05, "products": 0.5}
    assert found["kernel_ms"] == {"gemm_a": [0.5, 1.0]}
