"""Compares one card with layouts of several cards of one host, on the same machine in one run.

    python -m benchmarks.speed.cluster --config configs/h100x2.yaml \
        --arm "one:cluster=null generation.max_sequences=256" \
        --arm "apart:" \
        --arm "with_learner:cluster.rollouts.where=with_learner cluster.teachers.where=own" \
        --steps 10 --longtail-steps 22 student.model=models/random-4B scoring.model=models/random-8B

Each ``--arm NAME:OVERRIDES`` is one layout, in a process of its own; the first one is the base, and
sees one card only. Prompts, lengths and the loop are those of `overlap`: ``fixed`` is
`sampling.max_new_tokens` for all, ``longtail8`` is lognormal with p99/p50 = 8. The first ``--skip``
steps, in which the stages fill, do not count. Models must not stop by themselves.

Figures: ``tok_s_{lengths}_{arm}``, ``speedup_{lengths}`` (the best arm against the base),
``publish_pct_of_step`` (of the best arm, fixed lengths: the time of publishing and loading weights
in a step), ``peak_gib_{arm}`` (the fullest card).
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS, Report, write_result
from benchmarks.speed.overlap import Bench, RandomPrompts
from qwen3_distill.config import TaskPrompts
from qwen3_distill.config.load import load_config
from qwen3_distill.pipeline.assembly.engines import build_parts
from qwen3_distill.pipeline.step import push_weights

_POLL_S = 1.0
_MEDIAN_TOKENS, _MAX_TOKENS = 256, 4096


# --- One arm ------------------------------------------------------------------------------------


async def measure_arm(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start an arm's engines, stream with every distribution, and return the results."""
    config = load_config(arguments.config, arguments.overrides).model_copy(
        update={"prompts": TaskPrompts(kind="task"), "verifier": None, "evaluation": None}
    )
    parts = build_parts(config, lambda message: print(message, flush=True))
    vocab_size = parts.learner.identity.vocab_size
    parts = replace(parts, prompts=RandomPrompts(arguments.prompt_tokens, vocab_size))
    report = Report("cluster-arm", Path(arguments.out).parent)
    bench = Bench(parts, report, _MEDIAN_TOKENS, _MAX_TOKENS)
    results: dict[str, Any] = {}
    try:
        await parts.start(lambda text: print(text, flush=True))
        await push_weights(parts)
        for name, steps in (("fixed", arguments.steps), ("longtail8", arguments.longtail_steps)):
            if steps:
                results[name] = await bench.pipeline(
                    "streaming", name, steps, f"{arguments.arm_name}-{name}", skip=arguments.skip
                )
                print(name, json.dumps(results[name]), flush=True)
    finally:
        await parts.close()
    return results


# --- All of them --------------------------------------------------------------------------------


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Poll the used memory of every card; the list has the largest of each, in GiB."""
    peaks: list[float] = []
    done = threading.Event()

    def poll() -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not done.wait(_POLL_S):
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            used = [int(line) / 1024 for line in found.stdout.split() if line.isdecimal()]
            for i, value in enumerate(used):
                if i == len(peaks):
                    peaks.append(0.0)
                peaks[i] = max(peaks[i], value)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def run_arm(arguments: argparse.Namespace, name: str, overrides: str, is_base: bool) -> Any:
    """`measure_arm` in a process of its own; the base sees one card."""
    with tempfile.TemporaryDirectory(prefix="qwen3-distill-cluster-") as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.speed.cluster", "--config", arguments.config]
        command += ["--arm-name", name, "--out", str(out), "--skip", str(arguments.skip)]
        command += ["--steps", str(arguments.steps)]
        command += ["--longtail-steps", str(arguments.longtail_steps)]
        command += ["--prompt-tokens", str(arguments.prompt_tokens)]
        command += [*arguments.overrides, *overrides.split()]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": "0"} if is_base else {})
        print(f"--- {name}: {overrides}", flush=True)
        with peak_memory() as peaks:
            subprocess.run(command, env=environment, check=True)
        return json.loads(out.read_text()) | {"overrides": overrides, "peaks_gib": peaks}


def figures_of(arms: dict[str, Any]) -> dict[str, float]:
    base = next(iter(arms))
    figures: dict[str, float] = {}
    for lengths in ("fixed", "longtail8"):
        speeds = {arm: found[lengths]["tok_s"] for arm, found in arms.items() if lengths in found}
        figures |= {f"tok_s_{lengths}_{arm}": speed for arm, speed in speeds.items()}
        others = {arm: speed for arm, speed in speeds.items() if arm != base}
        if base in speeds and others:
            best = max(others, key=lambda arm: others[arm])
            figures[f"speedup_{lengths}"] = others[best] / speeds[base]
            if lengths == "fixed":
                times = arms[best][lengths]
                share = times["time/publish_s"] / times["time/step_s"]
                figures["publish_pct_of_step"] = 100 * share
    figures |= {f"peak_gib_{a}": max(found["peaks_gib"], default=0.0) for a, found in arms.items()}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME:OVERRIDES")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--longtail-steps", type=int, default=22)
    parser.add_argument("--skip", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--name", default="cluster_x2", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--arm-name", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.arm_name:
        Path(arguments.out).write_text(json.dumps(asyncio.run(measure_arm(arguments))))
        return
    arms: dict[str, Any] = {}
    for text in arguments.arm:
        name, _, overrides = text.partition(":")
        arms[name] = run_arm(arguments, name, overrides, is_base=not arms)
        write_result(arguments.name, figures_of(arms), folder=arguments.results, arms=arms)
    print(arguments.results / f"{arguments.name}.json")


if __name__ == "__main__":
    main()
