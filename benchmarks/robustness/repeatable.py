"""Repeats one start, and kills and resumes one run, and counts the results that differ.

    python -m benchmarks.robustness.repeatable --starts 2000 --resumes 100

A start is a forked process that loads the lab student and samples one batch on the CPU with two
threads; token ids and logprobs must be the same bits in every start. A resume is a short run of
the lab pair that is killed (SIGKILL) at a random moment after its first checkpoint and started
again; its ledger and its student must be the bits of a run that was left alone. ``--resume``
continues from the result, at the same commit only; ``--unsettled`` leaves out what settles the
vector math first, as a negative control.

Figures: ``starts``, ``different_starts``, ``resumes``, ``different_resumes``. A run that ended
before its moment is run again and counted in ``ended_early``.
"""

import argparse
import asyncio
import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401 - so that no fork imports it

from benchmarks.lib.common import RESULTS, commit, write_result
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


# --- Resumes ------------------------------------------------------------------------------------


def run_command(folder: Path) -> list[str]:
    demo = str(ROOT / "configs" / "demo.yaml")
    command = [sys.executable, "-m", "qwen3_distill.cli.main", "run", "--config", demo]
    return [*command, f"output_dir={folder}", *MODELS, *RUN]


def started(folder: Path) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    return subprocess.Popen(run_command(folder), stdout=quiet, stderr=quiet)


def wait_for_checkpoint(process: subprocess.Popen[bytes], folder: Path) -> bool:
    """Wait for a run's first checkpoint; return False if the run ended without one."""
    while process.poll() is None:
        if any(folder.glob("checkpoints/step-*")):
            return True
        time.sleep(0.01)
    return False


def finish(process: subprocess.Popen[bytes]) -> None:
    if code := process.wait():
        raise SystemExit(f"a run ended with status {code}: {process.args}")


def result_of(folder: Path) -> str:
    """Return the digest of a finished run's ledger and student."""
    files = (folder / "ledger.jsonl", *sorted((folder / "student").glob("*.safetensors")))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def run_alone() -> tuple[str, float]:
    """Run to the end; return the result, and the seconds from the first checkpoint to the end."""
    with tempfile.TemporaryDirectory(prefix="qwen3-distill-repeatable-") as name:
        process = started(folder := Path(name) / "run")
        wait_for_checkpoint(process, folder)
        began = time.perf_counter()
        finish(process)
        return result_of(folder), time.perf_counter() - began


def run_resumed(kill_after_s: float) -> str | None:
    """Kill a run some seconds after its first checkpoint, start it again and return its result.

    Returns:
        None if the run had ended before.
    """
    with tempfile.TemporaryDirectory(prefix="qwen3-distill-repeatable-") as name:
        process = started(folder := Path(name) / "run")
        if wait_for_checkpoint(process, folder):
            time.sleep(kill_after_s)
            process.kill()
        if process.wait() == 0:
            return None
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"a run ended with status {process.returncode}: {process.args}")
        finish(started(folder))
        return result_of(folder)


# --- All of them --------------------------------------------------------------------------------


def different(counts: dict[str, int]) -> int:
    """Return how many results differ from the most frequent one."""
    return sum(counts.values()) - max(counts.values(), default=0)


def figures_of(found: dict[str, Any]) -> dict[str, float]:
    return {
        "starts": sum(found["starts"].values()),
        "different_starts": different(found["starts"]),
        "resumes": len(found["runs"]),
        "different_resumes": sum(run["result"] != found["reference"] for run in found["runs"]),
        "ended_early": found["ended_early"],
    }


def write(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    write_result(arguments.name, figures_of(found), folder=arguments.results, **found)


def earlier_results(file: Path) -> dict[str, Any]:
    """Read what was found so far.

    Raises:
        SystemExit: it was found at another commit.
    """
    content = json.loads(file.read_text())
    if content["commit"] != commit():
        raise SystemExit(f"{file} is of commit {content['commit']}, not {commit()}; move it away")
    return {key: content[key] for key in nothing_found()}


def nothing_found() -> dict[str, Any]:
    return {"starts": {}, "reference": None, "rest_s": None, "runs": [], "ended_early": 0}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=2000)
    parser.add_argument("--resumes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--resume", action="store_true", help="results so far are kept")
    parser.add_argument("--unsettled", action="store_true", help="negative control")
    parser.add_argument("--name", default="repeatable", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    return parser.parse_args()


def repeat_starts(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    config = load_config(ROOT / "configs" / "demo.yaml", ["output_dir=unused", *MODELS, *RUN])
    sampling = config.sampling.model_copy(update={"max_new_tokens": NEW_TOKENS})
    config = config.model_copy(update={"sampling": sampling})
    counts, began = Counter[str](found["starts"]), time.perf_counter()
    first = sum(counts.values()) + 1
    for number in range(first, arguments.starts + 1):
        counts[forked_start(config)] += 1
        if number % 50 == 0 or number == arguments.starts:
            found["starts"] = dict(counts)
            write(arguments, found)
            left = _left_s(began, number + 1 - first, arguments.starts - number)
            print(f"[{number}/{arguments.starts} starts, {left}] {dict(counts)}", flush=True)


def repeat_resumes(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    if arguments.resumes and found["reference"] is None:
        found["reference"], found["rest_s"] = run_alone()
    began, first = time.perf_counter(), len(found["runs"])
    while (number := len(found["runs"])) < arguments.resumes:
        drawn = random.Random(f"{arguments.seed}/{number + found['ended_early']}")
        moment = drawn.uniform(0, 1) * found["rest_s"]
        result = run_resumed(moment)
        if result is None:
            found["ended_early"] += 1
        else:
            found["runs"].append({"result": result, "kill_after_s": moment})
        write(arguments, found)
        done = len(found["runs"]) - first
        left = _left_s(began, done, arguments.resumes - first - done)
        print(f"[{first + done}/{arguments.resumes} resumes, {left}] {result}", flush=True)


def _left_s(began: float, done: int, left: int) -> str:
    seconds = (time.perf_counter() - began) / max(done, 1)
    return f"{seconds:.2f} s each, {seconds * left:.0f} s left"


def main() -> None:
    arguments = parse_arguments()
    found, earlier = nothing_found(), arguments.results / f"{arguments.name}.json"
    if arguments.resume and earlier.exists():
        found = earlier_results(earlier)
    if arguments.unsettled:
        loading.settle_vector_math = functools.cache(lambda: None)
    repeat_starts(arguments, found)
    repeat_resumes(arguments, found)
    figures = figures_of(found)
    sys.exit(1 if figures["different_starts"] or figures["different_resumes"] else 0)


if __name__ == "__main__":
    main()
