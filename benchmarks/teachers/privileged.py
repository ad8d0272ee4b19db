"""A lab student that is its own teacher, with a hint in the context, learns to do without it.

    python -m benchmarks.teachers.privileged --seeds 5 --jobs 2

1. A warm start, once: the lab student learns to repeat a worked solution that stands in its system
   message. Problem and solution do not belong together there, so nothing of the task is learned;
   answers of its own, without a hint, keep what it knew.
2. `hinted`: the teacher is that student as it was at the start (``scoring.model: student``) and
   reads each row's worked solution in its system message. The student reads the problem alone.
3. `shuffled`, the control: the teacher reads the solution of another row.

Runs are in ``FOLDER/runs.jsonl``; a second call makes the missing ones. Figures: held-out accuracy
without a hint, at temperature 1, mean over seeds, into ``benchmarks/results/teachers.json``.
"""

import argparse
import asyncio
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.evidence.training import IGNORED, Example, Schedule, collate, train
from benchmarks.lib.common import RESULTS, merge_result
from benchmarks.lib.sweep import Sweep
from qwen3_distill.config import RunConfig, SamplingConfig
from qwen3_distill.config.load import check_config
from qwen3_distill.data.tasks import TASKS
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.types import Prompt, Rollout, RolloutRequest
from qwen3_distill.utils.files import atomic_path, write_json_atomic
from qwen3_distill.weights.directory import publish_directory
from qwen3_distill.weights.memory import MemoryChannel
from scripts.lab.tokenizer import ASSISTANT_ID, END_ID, USER_ID, prompt_tokens

STUDENT = Path("models/lab/student")
TASK = TASKS["chain"]
SYSTEM_ID = 260
ROWS = 4096
WARM_FIRST, OWN_ANSWERS = 10_000_000, 2048
"""Number of the first problem of the warm start, and how many answers of its own it repeats."""
WARM_ROWS, WARM_RATE = 64, 1e-3
MAX_NEW_TOKENS = 80
ARMS = ("hinted", "shuffled")


# --- The warm start -----------------------------------------------------------------------------


def solution(index: int) -> tuple[str, str]:
    """Return a training problem's text and its worked solution, without mistakes."""
    problem = TASK.problem("train", index)
    segments = TASK.solution_segments(problem, random.Random(index))
    return problem.text, "".join(part.text for part in segments if not part.is_error)


def hinted_example(index: int) -> Example:
    """A system message to repeat, before a problem that it is no solution of."""
    (text, _), (_, worked) = solution(WARM_FIRST + 2 * index), solution(WARM_FIRST + 2 * index + 1)
    asked = [SYSTEM_ID, *worked.encode(), END_ID, USER_ID, *text.encode(), END_ID, ASSISTANT_ID]
    answer = [*worked.encode(), END_ID]
    return Example([*asked, *answer], [*[IGNORED] * len(asked), *answer])


def own_examples(count: int) -> list[Example]:
    """Return the student's own answers at temperature 1, without a hint."""
    rollouts = asyncio.run(_own_answers(count))
    found: list[Example] = []
    for rollout in rollouts:
        asked, answer = rollout.prompt.token_ids.tolist(), rollout.response_ids.tolist()
        found.append(Example([*asked, *answer], [*[IGNORED] * len(asked), *answer]))
    return found


async def _own_answers(count: int) -> list[Rollout]:
    engine = EmbeddedRolloutEngine(STUDENT, device="cpu", dtype="float32", max_sequences=256)
    channel = MemoryChannel()
    await engine.load(publish_directory(STUDENT, channel, dtype=torch.float32), channel)
    first = WARM_FIRST + 10_000_000
    requests = [
        RolloutRequest(
            rollout_id=str(number),
            prompt=Prompt(
                prompt_id=str(number),
                token_ids=np.array(prompt_tokens(TASK.problem("train", first + number).text)),
            ),
            sampling=SamplingConfig(max_new_tokens=MAX_NEW_TOKENS).spec(number),
        )
        for number in range(count)
    ]
    rollouts = {rollout.rollout_id: rollout async for rollout in engine.generate(requests)}
    await engine.close()
    return [rollouts[request.rollout_id] for request in requests]


def warm_batches(steps: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield batches, half of them hinted and half the student's own answers."""
    own, half = own_examples(OWN_ANSWERS), WARM_ROWS // 2
    rng = random.Random(0)
    for step in range(steps):
        hinted = [hinted_example(step * half + row) for row in range(half)]
        yield collate([*hinted, *rng.sample(own, half)])


def warm_start(folder: Path, steps: int) -> Path:
    """Train the student that can use a hint, unless the folder has it; return its directory."""
    out = folder / "student"
    if (folder / "warm.json").is_file():
        return out
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(STUDENT, out)
    torch.manual_seed(0)
    model: Any = load_model(STUDENT, device=torch.device("cpu"), dtype=torch.float32)
    schedule = Schedule(steps=steps, learning_rate=WARM_RATE, warmup_steps=20)
    train(model, warm_batches(steps), schedule, "warm start")
    model.save_pretrained(out)
    write_json_atomic(folder / "warm.json", {"steps": steps})
    return out


# --- Runs ---------------------------------------------------------------------------------------


def write_rows(folder: Path, arm: str) -> None:
    """Write the training rows with each one's hint, or with another row's."""
    rows = [solution(index) for index in range(ROWS)]
    hints = [worked for _, worked in rows]
    if arm == "shuffled":
        order = np.random.Generator(np.random.PCG64(0)).permutation(ROWS)
        hints = [hints[place] for place in order]
    lines = [
        json.dumps({"prompt": text, "answer": worked.rpartition("#")[2], "hint": hint})
        for (text, worked), hint in zip(rows, hints, strict=True)
    ]
    with atomic_path(folder / f"{arm}.jsonl") as file:
        file.write_text("\n".join(lines) + "\n")


def arm_config(arm: str, seed: int, folder: Path, steps: int, problems: int) -> RunConfig:
    """Return the config of a run: the demo's, with the student as its own teacher."""
    sampling = {"temperature": 1.0, "max_new_tokens": MAX_NEW_TOKENS}
    return check_config(
        {
            "output_dir": str(folder / arm / str(seed)),
            "seed": seed,
            "steps": steps,
            "prompts_per_step": 64,
            "student": {"model": str(folder / "student")},
            "prompts": {
                "kind": "jsonl",
                "path": str(folder / f"{arm}.jsonl"),
                "answer_field": "answer",
            },
            "sampling": sampling,
            "generation": {"kind": "embedded", "device": "cpu"},
            "scoring": {
                "kind": "embedded",
                "device": "cpu",
                "model": "student",
                "context": {"system": "{{ row.hint }}", "compare_every_steps": 20},
            },
            "training": {
                "kind": "embedded",
                "device": "cpu",
                "optimizer": {
                    "learning_rate": 1e-3,
                    "betas": [0.9, 0.95],
                    "schedule": {
                        "kind": "warmup_cosine",
                        "warmup_steps": 5,
                        "final_fraction": 0.05,
                    },
                },
                "micro_batch_tokens": 8192,
                "chunk_tokens": 8192,
            },
            "objective": {
                "kind": "sampled_reverse_kl",
                "advantage_clip": 2.0,
                "kl_baseline": {"kind": "top_k", "k": 16},
            },
            "evaluation": {
                "prompts": {"kind": "task", "split": "eval"},
                "verifier": {"kind": "task"},
                "sampling": sampling,
                "every_steps": steps,
                "num_problems": problems,
                "teacher": False,
            },
            "checkpoint": {"every_steps": steps},
            "logging": {"tensorboard": False},
        }
    )


def run_arm(arm: str, seed: int, folder: str, steps: int, problems: int) -> dict[str, Any]:
    """Run an arm once; return its accuracies without a hint, and what the context told."""
    config = arm_config(arm, seed, Path(folder), steps, problems)
    shutil.rmtree(config.output_path, ignore_errors=True)
    summary = run(config, SilentReporter(), print)
    assert summary is not None
    lines = (config.output_path / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    accuracy = summary["accuracy"]
    return {
        "before": accuracy["before"]["value"],
        "after": accuracy["after"]["value"],
        "with_nats": first["context/with_nats"],
        "without_nats": first["context/without_nats"],
    }


# --- Figures ------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half width of the 95% interval over seeds, by Student's t."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values))
    if len(values) < 2:
        return fmean(values), 0.0
    return fmean(values), (t or 2.0) * stdev(values) / len(values) ** 0.5


def figures(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the figures of all runs, by the names of ``teachers.json``."""
    found: dict[str, float] = {}
    hinted, shuffled = ([r for r in runs if r["arguments"][0] == arm] for arm in ARMS)
    for name, values in {
        "privileged_before": [r["before"] for r in hinted],
        "privileged_after": [r["after"] for r in hinted],
        "privileged_shuffled_after": [r["after"] for r in shuffled],
    }.items():
        found[name], found[f"{name}_ci95"] = interval(values)
    return {**found, "privileged_seeds": len(hinted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one core each")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of a run")
    parser.add_argument("--warm-steps", type=int, default=600, help="steps of the warm start")
    parser.add_argument("--problems", type=int, default=1000, help="held-out problems")
    parser.add_argument("--folder", type=Path, default=Path("runs/teachers/privileged"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of teachers.json")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    warm_start(given.folder, given.warm_steps)
    for arm in ARMS:
        write_rows(given.folder, arm)
    jobs = {
        f"{arm}-{seed}": (arm, seed, str(given.folder), given.steps, given.problems)
        for seed in range(given.seeds)
        for arm in ARMS
    }
    sweep = Sweep(log=given.folder / "runs.jsonl", workers=given.jobs)
    runs = sweep.run(run_arm, jobs)
    if sweep.failed or len(runs) < len(jobs):
        raise SystemExit(f"{len(runs)} of {len(jobs)} runs are done; start again for the others")
    print(merge_result("teachers", figures(runs), folder=given.out, privileged=runs))


if __name__ == "__main__":
    main()
