"""Measures where a server's time goes that is asked for the most likely tokens of every place.

    PYTHONPATH=/site/sglang:src:. python -m benchmarks.speed.topk_profile --results out

One pass of SGLang has thousands of rows of logits. For rows of random logits: the seconds of each
thing that it does with them, scaled to ``--tokens`` tokens: float32 and log-softmax, the selection,
lists of Python, the lists of each sequence, arrays of them, and the same selection by blocks (the
16 largest values lie in the 16 blocks with the largest maxima, so two small selections do for one
over the whole vocabulary). SGLang's own functions are used where it is installed, and imported, so
that Python's garbage collection has as many objects to read as in a server; frozen, it has not;
and with the thresholds of our plugin it begins rarely.
"""
# ruff: noqa: PLC0415 - SGLang is not installed everywhere

import argparse
import base64
import gc
import importlib.util
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.common import RESULTS, Report
from qwen3_distill.scoring.sglang.in_server import THRESHOLDS, Rows


def lists_of_sequences(
    values: list[list[float]], ids: list[list[int]], k: int, length: int
) -> tuple[Any, Any]:
    """Return the rows of each sequence, as SGLang cuts them."""
    starts = range(0, len(values), length)
    cut = [
        [[row[:k] for row in rows[start : start + length]] for start in starts]
        for rows in (values, ids)
    ]
    return cut[0], cut[1]


def arrays_of(values: Any, ids: Any, k: int) -> list[tuple[Any, Any, int]]:
    """Return each sequence's arrays, by SGLang's function where there is one."""
    try:
        from sglang.srt.managers.io_struct import (  # pyright: ignore[reportMissingImports]
            build_flat_input_top_logprobs_arrays,
        )

        return [
            build_flat_input_top_logprobs_arrays([None, *v], [None, *i], k)
            for v, i in zip(values, ids, strict=True)
        ]
    except ImportError:
        return [
            (np.asarray(v, dtype=np.float32), np.asarray(i, dtype=np.int32), 1)
            for v, i in zip(values, ids, strict=True)
        ]


class Clock:
    """Times functions on a device, by their mean."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._rounds = device, rounds

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Run some rounds after one to warm up; return the last result."""
        result, taken = work(), list[float]()
        for _ in range(self._rounds):
            self._wait()
            began = time.perf_counter()
            result = work()
            self._wait()
            taken.append(time.perf_counter() - began)
        self.seconds[name] = float(np.mean(taken))
        return result

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def profile(arguments: argparse.Namespace, rows: int) -> dict[str, float]:
    """Return the seconds of each thing for ``rows`` rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock, k = Clock(device, arguments.rounds), arguments.k
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(
        rows, arguments.vocabulary, generator=generator, device=device, dtype=torch.bfloat16
    )
    exact = clock.time("float32", logits.float)
    logprobs: Tensor = clock.time("log_softmax", lambda: torch.log_softmax(exact, dim=-1))
    values, ids = clock.time("topk", lambda: logprobs.topk(k, dim=-1))
    other, _ = clock.time("topk_by_blocks", lambda: Rows(logprobs).topk(k))
    assert torch.equal(values, other), "the two selections differ"
    clock.time("topk_of_bfloat16", lambda: logits.topk(k, dim=-1))
    lists = clock.time("to_lists", lambda: (values.tolist(), ids.tolist()))
    cut = clock.time(
        "lists_of_sequences", lambda: lists_of_sequences(lists[0], lists[1], k, arguments.length)
    )
    arrays = clock.time("arrays", lambda: arrays_of(cut[0], cut[1], k))
    clock.time("between_processes", lambda: pickle.loads(pickle.dumps(arrays)))
    clock.time(
        "base64",
        lambda: [base64.b64encode(each.tobytes()) for pair in arrays for each in pair[:2]],
    )
    kept = list[Any]()

    def lists_of_a_pass() -> None:  # the server has some passes' lists at a time
        kept.append(lists_of_sequences(values.tolist(), ids.tolist(), k, arguments.length))
        del kept[:-4]

    clock.time("lists_of_passes", lists_of_a_pass)
    gc.freeze()
    clock.time("lists_of_passes_frozen", lists_of_a_pass)
    before = gc.get_threshold()
    gc.set_threshold(*THRESHOLDS)
    clock.time("lists_of_passes_rarely_collected", lists_of_a_pass)
    gc.set_threshold(*before)
    gc.unfreeze()
    clock.time("arrays_without_lists", lambda: (values.cpu().numpy(), ids.int().cpu().numpy()))
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=lambda text: list(map(int, text.split(","))), default=[8192])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="scored tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=131_072, help="of a step")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--name", default="topk_profile", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    report = Report(arguments.name, arguments.results)
    if importlib.util.find_spec("sglang") is not None:
        importlib.import_module("sglang.srt.managers.scheduler")
    for rows in arguments.rows:
        seconds = profile(arguments, rows)
        share = arguments.tokens / rows
        figures = {f"{name}_s_{rows}_rows": value * share for name, value in seconds.items()}
        report.add(f"{rows} rows", figures, seconds=seconds)


if __name__ == "__main__":
    main()
