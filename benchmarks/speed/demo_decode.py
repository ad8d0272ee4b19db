"""Compares ways to decode the demo's answers on a CPU: precision, kind of batch, compiled layers.

    python -m benchmarks.speed.demo_decode [--threads 2] [--rounds 3]

The demo's student answers eight steps' prompts, 64 at a time, as the demo's run does. A way is
PRECISION_BATCHING, with ``_compiled`` where every decoder layer is under `torch.compile` with
shapes of any size. Rounds alternate, so that all ways see the same disturbances. Figures are
medians of the rounds: ``WAY_tok_s``, tokens per second of wall time, the ratio
``WAY_vs_float32_continuous``, and ``WAY_first_s``, the seconds of the first call, in which layers
are compiled. Ways sample other tokens where rounding differs; a token's price is what is compared.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch

from benchmarks.lib.common import write_result
from benchmarks.speed.embedded_decode import CONFIG, MAX_SEQUENCES, STEPS, call_after_call
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.modeling.loading import resolve_dtype
from qwen3_distill.pipeline.assembly.data import build_prompts
from qwen3_distill.pipeline.parts import TextTools
from qwen3_distill.pipeline.requests import requests_for_step
from qwen3_distill.types import RolloutRequest
from qwen3_distill.weights.directory import publish_directory
from qwen3_distill.weights.memory import MemoryChannel

WAYS = (
    "float32_continuous",
    "float32_static",
    "bfloat16_continuous",
    "bfloat16_static",
    "float32_continuous_compiled",
    "float32_static_compiled",
)


async def serving(config: RunConfig, way: str) -> EmbeddedRolloutEngine:
    """Start an engine that decodes in one of the ways, and serves the config's student."""
    dtype, batching, *more = way.split("_")
    kind: Literal["continuous", "static"] = "static" if batching == "static" else "continuous"
    engine = EmbeddedRolloutEngine(
        config.student.model,
        device="cpu",
        dtype=dtype,
        max_sequences=MAX_SEQUENCES,
        batching=kind,
    )
    channel = MemoryChannel()
    published = resolve_dtype(config.training.dtype)
    await engine.load(publish_directory(config.student.model, channel, dtype=published), channel)
    if more:
        model: Any = engine._model
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    return engine


async def measure(rounds: int) -> dict[str, float]:
    """Return every way's figures."""
    config = load_config(CONFIG)
    prompts = build_prompts(config, TextTools(config.student.model))
    requests: Sequence[RolloutRequest] = [
        request
        for step in range(STEPS)
        for request in requests_for_step(
            config, prompts.take(step * MAX_SEQUENCES, MAX_SEQUENCES), step
        )
    ]
    engines, figures = dict[str, EmbeddedRolloutEngine](), dict[str, float]()
    for way in WAYS:
        engines[way] = await serving(config, way)
        began = time.perf_counter()
        await call_after_call(engines[way], requests)
        figures[f"{way}_first_s"] = time.perf_counter() - began
        print(way, figures[f"{way}_first_s"], flush=True)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, engine in engines.items():
            began = time.perf_counter()
            rollouts = await call_after_call(engine, requests)
            tokens = sum(rollout.num_tokens for rollout in rollouts)
            found[way].append(tokens / (time.perf_counter() - began))
    base = statistics.median(found[WAYS[0]])
    for way, rates in found.items():
        figures[f"{way}_tok_s"] = statistics.median(rates)
        figures[f"{way}_vs_{WAYS[0]}"] = statistics.median(rates) / base
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = asyncio.run(measure(arguments.rounds))
    for name, value in figures.items():
        print(f"{name}: {value:.2f}")
    write_result("demo_decode", {name: round(value, 3) for name, value in figures.items()})


if __name__ == "__main__":
    main()
