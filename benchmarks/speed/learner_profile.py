"""Profiles steps of an unsloth learner. Runs under unsloth's own interpreter, on a GPU.

    PYTHONPATH=src:. python -m benchmarks.speed.learner_profile --config configs/h200.yaml \\
        --learner unsloth_fp8_backward --work 128x512:1 --results out student.model=models/random-4B

The learner is one of `speed.learners`, here in this process. Some steps are taken before, some are
timed, and one is profiled: milliseconds of each kernel for every thousand tokens, and the share of
the time in which the GPU was idle. ``--lock FILE``: several start beside each other, and measure
one after another.
"""

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp(prefix="compiled-"))

from qwen3_distill.training.unsloth.student import open_learner  # isort: skip - before transformers

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.lib.common import RESULTS, Report
from benchmarks.lib.gpu_trace import gpu_work, idle_share, milliseconds
from benchmarks.lib.random_work import total_tokens
from benchmarks.speed.learners import Shape, config_of
from qwen3_distill.config.load import load_config
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.training.settings import LearnerSettings

# unsloth's own kernels are the rest.
CATEGORIES = {
    "attention": ("flash", "fmha", "cudnn", "attention", "sdpa"),
    "FP8 products": ("e4m3", "float_e4m3", "scaled_mm", "f8"),
    "matrix products": ("gemm", "nvjet", "cutlass", "matmul", "cublas", "splitk"),
    "compiled": ("triton_red", "triton_p", "triton_f"),
    "copies": ("memcpy", "memset", "copy", "catarray"),
    "element by element": ("elementwise", "reduce", "index", "scatter", "gather", "fill"),
}


@contextlib.contextmanager
def held(lock: Path | None) -> Iterator[None]:
    """Hold the file's lock, if there is one, until the end."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


async def measure(arguments: argparse.Namespace, report: Report) -> None:
    given = load_config(arguments.config, arguments.overrides)
    config = config_of(arguments.learner, given, arguments.micro_batch_tokens)
    (shape,) = Shape.parse(arguments.work)
    vocab_size = load_identity(config.student.model).vocab_size
    batch = shape.work(config, arguments, vocab_size).batch(arguments.sequences)
    learner = open_learner(
        LearnerSettings(
            model_dir=Path(config.student.model).resolve(),
            training=config.training,  # pyright: ignore[reportArgumentType] - unsloth's
            objective=config.objective,
            total_steps=100,
            seed=0,
        )
    )
    tokens = total_tokens([scored.rollout for scored in batch.scored])
    print(arguments.learner, learner.student.describe(), flush=True)
    with held(arguments.lock):
        for _ in range(arguments.warm_up):
            await learner.update(batch)
        steps = list[float]()
        for _ in range(arguments.rounds):
            began = time.perf_counter()
            await learner.update(batch)
            steps.append(time.perf_counter() - began)
        activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
        with profile(activities=[activity]) as recorded:
            await learner.update(batch)
        work = gpu_work(recorded)
        details = milliseconds(work, CATEGORIES, units=tokens / 1000, largest=60)
    name = f"{arguments.learner}_{shape.name}"
    figures = {
        f"{name}_tok_s": tokens * len(steps) / sum(steps),
        f"{name}_idle": idle_share(work),
    }
    report.add(name, figures, steps_s=steps, tokens=tokens, **details)
    print(json.dumps(details, indent=1), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="with an unsloth learner")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--learner", default="unsloth", help="as `speed.learners` names it")
    parser.add_argument("--work", default="128x512:1", help="likewise")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--micro-batch-tokens", type=int, default=10_240)
    parser.add_argument("--median-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--warm-up", type=int, default=2, help="steps")
    parser.add_argument("--rounds", type=int, default=3, help="steps that are timed")
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--name", default="learner_profile", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_intermixed_args()
    asyncio.run(measure(arguments, Report(arguments.name, arguments.results)))


if __name__ == "__main__":
    main()
