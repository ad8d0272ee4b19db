"""Repeats one start, and kills and resumes one run, and counts the results that differ.

    python -m benchmarks.robustness.repeatable --starts 2000 --interrupted 100

A start is a forked process that loads the lab student and samples one batch on the CPU with two
threads; token ids and logprobs must be the same bits in every start. An interrupted run is a short
run of the lab pair that is killed (SIGKILL) at a random moment and started again; its ledger and
its student must be the bits of a run that was left alone. ``--resume`` continues from the result;
``--unsettled`` leaves out what settles the vector math first, as a negative control.

Figures: ``starts``, ``differing_starts``, ``interrupted``, ``differing_runs``, ``killed`` (runs
that were killed before their end).
"""

import argparse
import asyncio
import functools
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401 - so that no fork imports it

from benchmarks.lib.common import RESULTS, write_result
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.modeling import loading
from qwen3_distill.pipeline.assembly.data import build_prompts
from qwen3_distill.pipeline.parts import TextTools
from qwen3_distill.pipeline.requests import requests_for_step
from qwen3_distill.pipeline.step import generate
from qwen3_distill.weights.directory import publish_directory
from qwen3_distill.weights.memory import MemoryChannel

ROOT = Path(__file__).parents[2]
THREADS, PROMPTS, NEW_TOKENS, STEPS = 2, 8, 4, 4
MODELS = (
    f"student.model={ROOT}/models/lab/student",
    f"scoring.model={ROOT}/models/lab/teacher",
)
RUN = (
    f"steps={STEPS}",
    f"prompts_per_step={PROMPTS}",
    "evaluation=null",
    "checkpoint.every_steps=1",
    "logging.tensorboard=false",
    "logging.trace=false",
)


# --- Starts -------------------------------------------------------------------------------------


def first_batch(config: RunConfig) -> str:
    """Load the student, sample the first batch and return the digest of its bits."""
    torch.set_num_threads(THREADS)
    engine = EmbeddedRolloutEngine(
        config.student.model, device="cpu", dtype="float32", max_sequences=PROMPTS
    )
    prompts = build_prompts(config, TextTools(config.student.model)).take(0, PROMPTS)
    requests = requests_for_step(config, prompts, 0)

    async def sample() -> str:
        channel = MemoryChannel()
        version = publish_directory(config.student.model, channel, dtype=torch.float32)
        await engine.load(version, channel)
        digest = hashlib.sha256()
        for rollout in await generate(engine, requests):
            digest.update(rollout.response_ids.tobytes() + rollout.behavior_logprobs.tobytes())
        return digest.hexdigest()[:16]

    return asyncio.run(sample())


def forked_start(config: RunConfig) -> str:
    """`first_batch` in a fork of this process, which has computed nothing."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.write(writing, first_batch(config).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        digest = pipe.read()
    os.waitpid(pid, 0)
    if not digest:
        raise SystemExit("a start sampled nothing; are the lab models made (make demo)?")
    return digest


# --- Interrupted runs ---------------------------------------------------------------------------


def run_command(folder: Path) -> list[str]:
    demo = str(ROOT / "configs" / "demo.yaml")
    command = [sys.executable, "-m", "qwen3_distill.cli.main", "run", "--config", demo]
    return [*command, f"output_dir={folder}", *MODELS, *RUN]


def run_quietly(folder: Path, timeout_s: float | None = None) -> None:
    """Run the command to its end, or kill it (SIGKILL) after a time and raise TimeoutExpired."""
    quiet = subprocess.DEVNULL
    command = run_command(folder)
    subprocess.run(command, stdout=quiet, stderr=quiet, timeout=timeout_s, check=True)


def result_of(folder: Path) -> str:
    """Return the digest of a finished run's ledger and student."""
    files = (folder / "ledger.jsonl", *sorted((folder / "student").glob("*.safetensors")))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def one_run(kill_after_s: float | None) -> tuple[str, bool, float]:
    """Run, killed once after some seconds; return the result, whether it was killed, seconds."""
    began, killed = time.perf_counter(), False
    with tempfile.TemporaryDirectory(prefix="qwen3-distill-repeatable-") as name:
        folder = Path(name) / "run"
        if kill_after_s is not None:
            try:
                run_quietly(folder, kill_after_s)
            except subprocess.TimeoutExpired:  # it was killed with SIGKILL
                killed = True
        run_quietly(folder)
        return result_of(folder), killed, time.perf_counter() - began


# --- All of them --------------------------------------------------------------------------------


def differing(counts: dict[str, int]) -> int:
    """Return how many results differ from the most frequent one."""
    return sum(counts.values()) - max(counts.values(), default=0)


def report(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    starts, runs = found["starts"], found["runs"]
    figures: dict[str, float] = {
        "starts": sum(starts.values()),
        "differing_starts": differing(starts),
        "interrupted": len(runs),
        "differing_runs": sum(run["result"] != found["reference"] for run in runs),
        "killed": sum(run["killed"] for run in runs),
    }
    write_result(arguments.name, figures, folder=arguments.results, **found)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=2000)
    parser.add_argument("--interrupted", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--resume", action="store_true", help="results so far are kept")
    parser.add_argument("--unsettled", action="store_true", help="negative control")
    parser.add_argument("--name", default="repeatable", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    found: dict[str, Any] = {"starts": {}, "reference": None, "reference_s": None, "runs": []}
    earlier = arguments.results / f"{arguments.name}.json"
    if arguments.resume and earlier.exists():
        content = json.loads(earlier.read_text())
        found = {key: content[key] for key in found}
    if arguments.unsettled:
        loading.settle_vector_math = functools.cache(lambda: None)
    config = load_config(ROOT / "configs" / "demo.yaml", ["output_dir=unused", *MODELS, *RUN])
    sampling = config.sampling.model_copy(update={"max_new_tokens": NEW_TOKENS})
    config = config.model_copy(update={"sampling": sampling})
    counts = Counter[str](found["starts"])
    for number in range(sum(counts.values()) + 1, arguments.starts + 1):
        counts[forked_start(config)] += 1
        if number % 50 == 0 or number == arguments.starts:
            found["starts"] = dict(counts)
            report(arguments, found)
            print(f"[{number}/{arguments.starts} starts] {dict(counts)}", flush=True)
    if arguments.interrupted and found["reference"] is None:
        found["reference"], _, found["reference_s"] = one_run(None)
    for number in range(len(found["runs"]), arguments.interrupted):
        moment = random.Random(f"{arguments.seed}/{number}").uniform(0.2, 1) * found["reference_s"]
        result, killed, _ = one_run(moment)
        found["runs"].append({"result": result, "killed": killed, "kill_after_s": moment})
        report(arguments, found)
        print(f"[{number + 1}/{arguments.interrupted} runs] {found['runs'][-1]}", flush=True)
    bad = differing(counts) or any(run["result"] != found["reference"] for run in found["runs"])
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
