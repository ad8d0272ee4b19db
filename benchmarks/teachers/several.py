"""Trains one student on two tasks with a teacher for each, which knows only its own.

    python -m benchmarks.teachers.several --seeds 5

The tasks are the lab's chains, whose teacher is models/lab/teacher, and sums of two-digit numbers,
whose teacher is trained here on worked answers. The student is models/lab/student, trained on some
worked answers of both tasks, so that it knows their forms and some of the sums. Everything lies in
`--folder`; what is there is not made again, so the same command goes on after an interruption.

Figures, added to results/teachers.json: `two_teachers_task_a` (chains) and `two_teachers_task_b`
(sums), the lowest accuracy of the student after training over the seeds; `..._before`, the highest
before; `..._teacher_a` and `..._teacher_b`, what each teacher alone has on the task.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from transformers import Qwen3ForCausalLM

from benchmarks.evidence.settings import CPU
from benchmarks.evidence.training import (
    IGNORED,
    Example,
    Schedule,
    build_model,
    collate,
    save_bfloat16,
    train,
)
from benchmarks.lib.common import RESULTS, merge_result
from qwen3_distill.data.chain_task import ChainTask, Split
from qwen3_distill.data.digit_tasks import SumTask
from qwen3_distill.data.tasks import Task
from qwen3_distill.modeling.loading import load_model
from scripts.lab.tokenizer import END_ID, prompt_tokens

TASKS: dict[str, Task] = {"chain": ChainTask(), "sum": SumTask(digits=2)}
CHAIN_TEACHER, STUDENT = "models/lab/teacher", "models/lab/student"
TRAIN_ROWS, HELD_OUT_ROWS = 6000, 500
SUM_STEPS, FORM_STEPS, ROWS = 1200, 300, 64
_FINISHED = "finished"

Batches = Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]


def example(tag: str, number: int) -> Example:
    """Return a training problem with its worked answer."""
    task = TASKS[tag]
    problem = task.problem("train", number)
    prompt = prompt_tokens(problem.text)
    answer = [
        token
        for segment in task.solution_segments(problem, random.Random(number))
        if not segment.is_error
        for token in segment.text.encode()
    ]
    return Example([*prompt, *answer, END_ID], [*[IGNORED] * len(prompt), *answer, END_ID])


def batches(tags: Sequence[str], steps: int, first: int) -> Batches:
    """Yield batches of problems of the tags in turn, from number ``first`` on."""
    for step in range(steps):
        numbers = range(first + step * ROWS, first + (step + 1) * ROWS)
        yield collate([example(tags[number % len(tags)], number) for number in numbers])


def made(
    model: Qwen3ForCausalLM, directory: Path, tags: Sequence[str], steps: int, rate: float
) -> None:
    """Train a model on worked answers and save it."""
    schedule = Schedule(steps=steps, learning_rate=rate, warmup_steps=steps // 10)
    # Not the rows of the runs: those come first.
    train(model, batches(tags, steps, first=TRAIN_ROWS), schedule, directory.name)
    save_bfloat16(model, directory)
    (directory / _FINISHED).touch()


def make_models(folder: Path) -> None:
    """Train the teacher of sums and the student's forms, unless they are there."""
    cpu = torch.device("cpu")
    if not (folder / "sum-teacher" / _FINISHED).exists():
        torch.manual_seed(0)
        made(build_model(CPU.teacher, cpu), folder / "sum-teacher", ["sum"], SUM_STEPS, 2e-3)
    if not (folder / "student" / _FINISHED).exists():
        student: Any = load_model(STUDENT, device=cpu, dtype=torch.float32)
        made(student, folder / "student", ["chain", "sum", "sum", "sum"], FORM_STEPS, 1e-3)


def write_rows(file: Path, split: Split, count: int) -> None:
    """Write the problems of both tasks, in turns."""
    lines = []
    for number in range(count):
        for tag, task in TASKS.items():
            problem = task.problem(split, number)
            lines.append({"prompt": problem.text, "answer": problem.answer, "task": tag})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def config(folder: Path, steps: int) -> Path:
    """Write the config of the runs; return its path."""
    rows = {"kind": "jsonl", "answer_field": "answer"}
    verifier = {
        "kind": "python",
        "function": str(Path(__file__).with_name("verdict.py")) + ":is_right",
    }
    embedded = {"kind": "embedded", "device": "cpu"}
    values = {
        "output_dir": str(folder / "run"),
        "steps": steps,
        "prompts_per_step": 192,
        "student": {"model": str(folder / "student")},
        "prompts": {**rows, "path": str(folder / "train.jsonl")},
        "sampling": {"max_new_tokens": 80},
        "generation": embedded,
        "scoring": {
            "kind": "several",
            "by": "task",
            "teachers": {
                "chain": {**embedded, "model": CHAIN_TEACHER},
                "sum": {**embedded, "model": str(folder / "sum-teacher")},
            },
            "weights": {"chain": 1.0, "sum": 3.0},
        },
        "training": {
            **embedded,
            "optimizer": {
                "learning_rate": 1e-3,
                "betas": [0.9, 0.95],
                "schedule": {"kind": "warmup_cosine", "warmup_steps": 5, "final_fraction": 0.05},
            },
            "chunk_tokens": 8192,
        },
        "objective": {"kind": "top_k", "k": 16},
        "verifier": verifier,
        "evaluation": {
            "prompts": {**rows, "path": str(folder / "held_out.jsonl")},
            "verifier": verifier,
            "sampling": {"max_new_tokens": 80},
            "every_steps": 40,
            "num_problems": 200,
            "final_num_problems": 2 * HELD_OUT_ROWS,
        },
        "checkpoint": {"every_steps": 20},
        "logging": {"tensorboard": False},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def command(*arguments: str) -> None:
    """Run a command of the package in a process of its own."""
    subprocess.run([sys.executable, "-m", "qwen3_distill.cli.main", *arguments], check=True)


def run_seed(file: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Run one seed, or go on with it; return the first and the last evaluation by tag."""
    run = folder / f"seed-{seed}"
    if not (run / "summary.json").exists():
        command("run", "--config", str(file), f"seed={seed}", f"output_dir={run}")
    records = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    student = [record for record in records if record["model"] == "student"]
    return {"seed": seed, "before": _by_tag(student[0]), "after": _by_tag(student[-1])}


def alone(file: Path, folder: Path, model: str, name: str) -> dict[str, float]:
    """Measure one teacher on both tasks."""
    out = folder / f"{name}-alone.json"
    if not out.exists():
        command("eval", "--config", str(file), "--model", model, "--out", str(out))
    return _by_tag(json.loads(out.read_text()))


def _by_tag(record: dict[str, Any]) -> dict[str, float]:
    return {tag: record[f"accuracy/{tag}"] for tag in TASKS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("runs/several-teachers"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of teachers.json")
    parser.add_argument("--again", action="store_true", help="Make everything anew.")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if arguments.again:
        shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder, exist_ok=True)
    write_rows(folder / "train.jsonl", "train", TRAIN_ROWS)
    write_rows(folder / "held_out.jsonl", "eval", HELD_OUT_ROWS)
    make_models(folder)
    file = config(folder, arguments.steps)
    teachers = {
        "a": alone(file, folder, CHAIN_TEACHER, "chain-teacher"),
        "b": alone(file, folder, str(folder / "sum-teacher"), "sum-teacher"),
    }
    runs = [run_seed(file, folder, seed) for seed in range(arguments.seeds)]
    figures: dict[str, float] = {"two_teachers_seeds": len(runs)}
    for letter, tag in (("a", "chain"), ("b", "sum")):
        key = f"two_teachers_task_{letter}"
        figures[key] = min(run["after"][tag] for run in runs)
        figures[f"{key}_before"] = max(run["before"][tag] for run in runs)
        for which, measured in teachers.items():
            figures[f"{key}_teacher_{which}"] = measured[tag]
    details = {"runs": runs, "steps": arguments.steps}
    path = merge_result("teachers", figures, folder=arguments.out, two_teachers=details)
    print(path, json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
