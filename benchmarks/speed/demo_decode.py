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
from typing import Any, Literal

import torch

from benchmarks.lib.common import write_result
from benchmarks.speed.embedded_decode import CONFIG, call_after_call, requests_of, serving
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine

WAYS = (
    "float32_continuous",
    "float32_static",
    "bfloat16_continuous",
    "bfloat16_static",
    "float32_continuous_compiled",
    "float32_static_compiled",
)


async def serving_as(config: RunConfig, way: str) -> EmbeddedRolloutEngine:
    """Start an engine that decodes in one of the ways, and serves the config's student."""
    dtype, batching, *more = way.split("_")
    kind: Literal["continuous", "static"] = "static" if batching == "static" else "continuous"
    engine = await serving(config, dtype, kind)
    if more:
        model: Any = engine._model
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    return engine


async def measure(rounds: int) -> dict[str, float]:
    """Return every way's figures."""
    config = load_config(CONFIG)
    requests = requests_of(config)
    engines, figures = dict[str, EmbeddedRolloutEngine](), dict[str, float]()
    for way in WAYS:
        engines[way] = await serving_as(config, way)
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
