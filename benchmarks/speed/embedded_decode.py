"""Compares successive and overlapping calls of the embedded rollout engine.

    python -m benchmarks.speed.embedded_decode [--threads 1] [--rounds 3]

The lab student answers 512 prompts, at most 64 at a time. "as_trained": responses end by
themselves, in calls of 64 requests one after another, as in a sequential run. "tail80" and
"tail320": lengths come from a lognormal law (p99/p50 of 8) cut at 80 and at 320 tokens, so that
all ways generate the same tokens: the same calls of 64 one after another; all 512 in one call; and
64 clients that request one rollout after another. Figures are tokens per second of processor time,
as the machine may be shared, and medians of the rounds. Rounds alternate, so that all ways see the
same disturbances.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.lib.common import write_result
from benchmarks.speed.overlap import without_eos
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.modeling.loading import resolve_dtype
from qwen3_distill.pipeline.assembly.data import build_prompts
from qwen3_distill.pipeline.parts import TextTools
from qwen3_distill.pipeline.requests import requests_for_step
from qwen3_distill.types import Rollout, RolloutRequest
from qwen3_distill.weights.directory import publish_directory
from qwen3_distill.weights.memory import MemoryChannel

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"
STEPS, MAX_SEQUENCES = 8, 64
Way = Callable[[EmbeddedRolloutEngine, Sequence[RolloutRequest]], Awaitable[list[Rollout]]]


async def one_call(
    engine: EmbeddedRolloutEngine, requests: Sequence[RolloutRequest]
) -> list[Rollout]:
    return [rollout async for rollout in engine.generate(requests)]


async def call_after_call(
    engine: EmbeddedRolloutEngine, requests: Sequence[RolloutRequest]
) -> list[Rollout]:
    rollouts: list[Rollout] = []
    for start in range(0, len(requests), MAX_SEQUENCES):
        rollouts += await one_call(engine, requests[start : start + MAX_SEQUENCES])
    return rollouts


async def one_by_one(
    engine: EmbeddedRolloutEngine, requests: Sequence[RolloutRequest]
) -> list[Rollout]:
    left = iter(requests)

    async def client() -> list[Rollout]:
        return [rollout for request in left for rollout in await one_call(engine, [request])]

    parts = await asyncio.gather(*(client() for _ in range(MAX_SEQUENCES)))
    return [rollout for part in parts for rollout in part]


WAYS: dict[str, Way] = {
    "call_after_call": call_after_call,
    "all_at_once": one_call,
    "one_by_one": one_by_one,
}


def with_lengths(requests: Sequence[RolloutRequest], longest: int) -> Iterator[RolloutRequest]:
    lengths = np.exp(np.random.default_rng(0).normal(np.log(40), 0.9, len(requests)))
    for request, length in zip(requests, np.clip(lengths, 4, longest).astype(int), strict=True):
        sampling = replace(request.sampling, max_new_tokens=int(length))
        yield replace(request, sampling=sampling)


async def tokens_per_s(
    engine: EmbeddedRolloutEngine, way: Way, requests: Sequence[RolloutRequest]
) -> float:
    began = time.process_time()
    rollouts = await way(engine, requests)
    return sum(rollout.num_tokens for rollout in rollouts) / (time.process_time() - began)


async def serving(
    config: RunConfig,
    dtype: str = "float32",
    batching: Literal["continuous", "static"] = "continuous",
) -> EmbeddedRolloutEngine:
    """Start an engine that serves the config's student."""
    engine = EmbeddedRolloutEngine(
        config.student.model,
        device="cpu",
        dtype=dtype,
        max_sequences=MAX_SEQUENCES,
        batching=batching,
    )
    channel = MemoryChannel()
    published = resolve_dtype(config.training.dtype)
    version = publish_directory(config.student.model, channel, dtype=published)
    await engine.load(version, channel)
    return engine


def requests_of(config: RunConfig) -> list[RolloutRequest]:
    """Return the requests of the config's first steps."""
    prompts = build_prompts(config, TextTools(config.student.model))
    return [
        request
        for step in range(STEPS)
        for request in requests_for_step(
            config, prompts.take(step * MAX_SEQUENCES, MAX_SEQUENCES), step
        )
    ]


async def measure(rounds: int, folder: Path) -> dict[str, float]:
    config = load_config(CONFIG)
    requests = requests_of(config)
    free = await serving(config)
    forced = await serving(config.model_copy(update=without_eos(config, folder)))
    cases = {"as_trained_call_after_call": (free, call_after_call, requests)} | {
        f"tail{longest}_{name}": (forced, way, list(with_lengths(requests, longest)))
        for longest in (80, 320)
        for name, way in WAYS.items()
    }
    await one_call(free, requests[:MAX_SEQUENCES])  # warm
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (engine, way, asked) in cases.items():
            found[name].append(await tokens_per_s(engine, way, asked))
    return {f"{name}_tok_s": statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure(args.rounds, Path(folder)))
    for longest in (80, 320):
        plain = figures[f"tail{longest}_call_after_call_tok_s"]
        for name in ("all_at_once", "one_by_one"):
            ours = figures[f"tail{longest}_{name}_tok_s"]
            figures[f"tail{longest}_{name}_speedup"] = ours / plain
    for name, value in figures.items():
        print(f"{name}: {value:.2f}")
    write_result("embedded_decode", {name: round(v, 3) for name, v in figures.items()})


if __name__ == "__main__":
    main()
