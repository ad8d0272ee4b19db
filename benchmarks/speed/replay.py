"""Compares the replay buffer with TorchRL's prioritized TensorDict buffer, in one run.

Both hold 65,536 rollouts of 64 to 1,024 tokens (ids, the student's and the teacher's logprobs) on
the same device. A round is what a learner does with a batch: add 256 rollouts, draw 256 by
priority^0.6 with importance weights, give the drawn ones new priorities. Each side gets its batches
in its own form: TorchRL's rows have one length, so they come padded to 1,024 tokens and already
stacked; ours are flat, without padding. TorchRL returns a copy of the rows. Ours are read in place,
as the learner does (``ours``); ``ours_copied`` also copies them into dense tensors. `host_fraction`
is the share of a side's time in which the host was busy (or waited for the device by itself): near
1, the device is not the bottleneck. The sides alternate every 25 rounds. A rollout counts once per
round.

    python -m benchmarks.speed.replay --device cpu     # or cuda; figures go to results/replay.json

Only this benchmark needs TorchRL. Its wheels are built for one torch each; for torch 2.13 the
compiled part must be built again (``--rebuild-torchrl``, about a minute with g++ and ninja).

    python -m venv replay-bench
    replay-bench/bin/pip install -e . torch==2.13.0 torchrl==0.14.1 tensordict==0.14.3 ninja
    replay-bench/bin/python -m benchmarks.speed.replay --rebuild-torchrl
    replay-bench/bin/python -m benchmarks.speed.replay --device cpu --threads 1

For torch 2.11 take torchrl 0.12.0 with tensordict 0.12.4; if it reports that SumSegmentTreeFp32 is
not available, rebuild it the same way.
"""

# pyright: reportMissingImports=false

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.common import RESULTS, write_result
from qwen3_distill.config import ProportionalLaw, ReplayConfig
from qwen3_distill.replay.buffer import ReplayBuffer
from qwen3_distill.replay.flat import FlatRollouts

ROLLOUTS = 65_536
BATCH = 256
MIN_TOKENS, MAX_TOKENS = 64, 1_024
ALPHA, BETA = 0.6, 0.4
DISTINCT_BATCHES = 8
BLOCK, WARM_UP = 25, 3
"""Rounds of one side before the next side's turn; and warm-up rounds, which do not count."""


@dataclass(frozen=True)
class Timings:
    """Seconds of each round."""

    add: list[float]
    draw: list[float]
    refresh: list[float]
    issued: list[float]
    """Seconds until the call of each part returned; the device may have needed longer."""

    def rounds(self) -> list[float]:
        return [sum(parts) for parts in zip(self.add, self.draw, self.refresh, strict=True)]

    def figures(self, name: str) -> dict[str, float]:
        """Rollouts per second, from medians."""
        stages = {"add": self.add, "draw": self.draw, "refresh": self.refresh}
        stages["round"] = self.rounds()
        rates = {f"{name}_{k}_rollouts_s": BATCH / statistics.median(v) for k, v in stages.items()}
        return {**rates, f"{name}_host_fraction": sum(self.issued) / sum(stages["round"])}


class Ours:
    """`ReplayBuffer`, with flat batches.

    Args:
        copies: what is drawn is also copied.
    """

    def __init__(self, device: torch.device, *, copies: bool) -> None:
        rng = np.random.default_rng(0)
        self.batches = [_flat_batch(rng, device) for _ in range(DISTINCT_BATCHES)]
        mean_tokens = (MIN_TOKENS + MAX_TOKENS) / 2 * 1.02  # so that places decide
        config = ReplayConfig(
            capacity_tokens=int(ROLLOUTS * mean_tokens),
            capacity_rollouts=ROLLOUTS,
            max_age_steps=10**6,
            law=ProportionalLaw(kind="proportional", alpha=ALPHA),
            beta_start=BETA,
            beta_end=BETA,
        )
        self.buffer = ReplayBuffer(config, candidates=0, device=device, seed=0)
        self.bytes = self.buffer.num_bytes
        self._priority = np.ones(BATCH)
        self._copies = copies
        self._step = 0
        self._sample: Any = None

    def add(self, index: int) -> None:
        self.buffer.add_flat(self.batches[index % DISTINCT_BATCHES], self._priority)

    def draw(self) -> Tensor:
        self._step += 1
        self._sample = self.buffer.sample(BATCH, self._step)
        drawn = self.buffer.gather(self._sample)
        return (drawn.dense() if self._copies else drawn).token_id_F

    def refresh(self, priority_S: Tensor) -> None:
        self.buffer.mark_used(self._sample, priority_S)


class TorchRL:
    """`TensorDictPrioritizedReplayBuffer` over rows padded to the longest."""

    def __init__(self, device: torch.device) -> None:
        from tensordict import (  # noqa: PLC0415
            TensorDict,
        )
        from torchrl.data import (  # noqa: PLC0415
            LazyTensorStorage,
            TensorDictPrioritizedReplayBuffer,
        )

        rng = np.random.default_rng(0)
        self.batches = [
            TensorDict(_padded_batch(rng, device), batch_size=[BATCH], device=device)
            for _ in range(DISTINCT_BATCHES)
        ]
        self.buffer: Any = TensorDictPrioritizedReplayBuffer(
            alpha=ALPHA,
            beta=BETA,
            storage=LazyTensorStorage(ROLLOUTS, device=device),
            batch_size=BATCH,
            priority_key="priority",
        )
        self.bytes = ROLLOUTS * sum(
            value[0].numel() * value.element_size() for value in self.batches[0].values()
        )
        self._sample: Any = None

    def add(self, index: int) -> None:
        self.buffer.extend(self.batches[index % DISTINCT_BATCHES])

    def draw(self) -> Tensor:
        self._sample = self.buffer.sample()
        return self._sample["token_id"]

    def refresh(self, priority_S: Tensor) -> None:
        self._sample["priority"] = priority_S
        self.buffer.update_tensordict_priority(self._sample)


Side: TypeAlias = Ours | TorchRL


def _lengths(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    tokens = rng.integers(MIN_TOKENS, MAX_TOKENS + 1, size=BATCH)
    prompt = tokens // 4
    return prompt, tokens - prompt


def _flat_batch(rng: np.random.Generator, device: torch.device) -> FlatRollouts:
    prompt_S, response_S = _lengths(rng)
    tokens_S = prompt_S + response_S
    slots = int(tokens_S.sum())
    return FlatRollouts(
        token_id_F=torch.randint(0, 150_000, (slots,), dtype=torch.int32, device=device),
        behavior_logprob_F=-torch.rand(slots, device=device),
        teacher_logprob_F=-torch.rand(slots, device=device),
        starts_S=np.cumsum(tokens_S) - tokens_S,
        prompt_tokens_S=prompt_S,
        response_tokens_S=response_S,
        oldest_step_S=np.zeros(BATCH, dtype=np.int64),
    )


def _padded_batch(rng: np.random.Generator, device: torch.device) -> dict[str, Tensor]:
    prompt_S, response_S = (torch.from_numpy(part) for part in _lengths(rng))
    shape = (BATCH, MAX_TOKENS)
    return {
        "token_id": torch.randint(0, 150_000, shape, dtype=torch.int32, device=device),
        "behavior_logprob": -torch.rand(shape, device=device),
        "teacher_logprob": -torch.rand(shape, device=device),
        "prompt_tokens": prompt_S.to(device),
        "response_tokens": response_S.to(device),
        "oldest_step": torch.zeros(BATCH, dtype=torch.int64, device=device),
        "priority": torch.ones(BATCH, device=device),
    }


def measure(sides: dict[str, Side], device: torch.device, rounds: int) -> dict[str, Timings]:
    """Fill every buffer, then measure the sides in turn."""
    for side in sides.values():
        for index in range(ROLLOUTS // BATCH):
            side.add(index)
    timings = {name: Timings([], [], [], []) for name in sides}
    for first in range(0, rounds, BLOCK):
        for name, side in sides.items():
            _block(side, timings[name], range(first, min(first + BLOCK, rounds)), device)
    return timings


def _block(side: Side, record: Timings, rounds: range, device: torch.device) -> None:
    """Measure rounds of one side, after a warm-up."""
    for number in (*range(-WARM_UP, 0), *rounds):
        priority_S = torch.rand(BATCH, device=device) + 0.01
        parts = (
            _seconds(partial(side.add, number), device),
            _seconds(side.draw, device),
            _seconds(partial(side.refresh, priority_S), device),
        )
        if number >= 0:
            for values, (issued, seconds) in zip(
                (record.add, record.draw, record.refresh), parts, strict=True
            ):
                values.append(seconds)
                record.issued.append(issued)


def _seconds(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the seconds until the call returned and until the device was done."""
    _wait(device)
    started = time.perf_counter()
    work()
    issued = time.perf_counter() - started
    _wait(device)
    return issued, time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rebuild_torchrl() -> None:
    """Compile TorchRL's extension against the installed torch, replacing the wheel's."""
    from torch.utils.cpp_extension import load  # noqa: PLC0415 - needs ninja

    spec = importlib.util.find_spec("torchrl")
    if spec is None or spec.origin is None:
        raise SystemExit("torchrl is not installed; the commands are in this file's docstring")
    package = Path(spec.origin).parent
    with tempfile.TemporaryDirectory() as build:
        load(
            "_torchrl",
            [str(path) for path in sorted((package / "csrc").glob("*.cpp"))],
            extra_cflags=["-std=c++20", "-O3"],
            extra_include_paths=[str(package / "csrc")],
            build_directory=build,
            is_python_module=False,
        )
        target = next(package.glob("_torchrl*.so"))
        shutil.copy(Path(build) / "_torchrl.so", target)
    print(f"rebuilt {target}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Replay compared with TorchRL's prioritized buffer"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU; default: its own")
    parser.add_argument("--rebuild-torchrl", action="store_true")
    parser.add_argument("--label", help="names the device in the figures; default: cpu or h200")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.rebuild_torchrl:
        rebuild_torchrl()
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    label = arguments.label or {"cpu": "cpu", "cuda": "h200"}[arguments.device]
    load_before = os.getloadavg()[0]
    sides: dict[str, Side] = {
        "torchrl": TorchRL(device),
        "ours": Ours(device, copies=False),
        "ours_copied": Ours(device, copies=True),
    }
    timings = measure(sides, device, arguments.rounds)
    median = {name: statistics.median(timing.rounds()) for name, timing in timings.items()}
    figures = {
        f"{label}_vs_torchrl": median["torchrl"] / median["ours"],
        f"{label}_copied_vs_torchrl": median["torchrl"] / median["ours_copied"],
    }
    for name, timing in timings.items():
        figures |= timing.figures(f"{label}_{name}")
        figures[f"{label}_{name}_bytes"] = sides[name].bytes
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "load_average_before": load_before,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "torchrl": metadata.version("torchrl"),
        "tensordict": metadata.version("tensordict"),
    }
    earlier = _earlier(arguments.out / "replay.json")
    path = write_result(
        "replay",
        earlier.get("figures", {}) | figures,
        folder=arguments.out,
        runs=earlier.get("runs", {}) | {label: about},
    )
    print(json.dumps(figures | about, indent=1))
    print(path)


def _earlier(path: Path) -> dict[str, Any]:
    """The earlier result, whose figures of the other device are kept."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


if __name__ == "__main__":
    main()
