"""Train the lab models: a small teacher, and two students warm-started on the teacher's samples.

The `student` knows the task and makes a mistake every few lines. The `beginner`, with which the
demo begins, does not know it yet. All are plain `Qwen3ForCausalLM` directories for the task in
`qwen3_distill.data.chain_task`. The script is deterministic for a given seed, thread count and
machine:

    python scripts/make_lab_models.py --seed 0
    python scripts/make_lab_models.py --stages student evaluate
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3ForCausalLM

from lab.examples import Example, pool_batches, sampled_example, worked_batches
from lab.models import build_model, load_model, save_model
from lab.sampling import evaluate, sample
from lab.settings import (
    BEGINNER_POOL_SIZE,
    BEGINNER_SCHEDULE,
    BEGINNER_TEMPERATURE,
    SAMPLE_POOL_SIZE,
    SAMPLING_BATCH,
    STUDENT_SCHEDULE,
    STUDENT_SHAPE,
    TEACHER_SCHEDULE,
    TEACHER_SHAPE,
    WARM_START_TEMPERATURE,
    Schedule,
)
from lab.tokenizer import check_tokenizer, prompt_tokens, write_tokenizer
from lab.training import report, train
from qwen3_distill.data.chain_task import ChainTask
from qwen3_distill.modeling.cpu_warmup import settle_vector_math

STAGES = ("tokenizer", "teacher", "student", "beginner", "evaluate")
NEAR_GREEDY = 1e-3
"""A temperature at which the most likely token is drawn, ties apart."""


def draw_sample_pool(
    teacher: Qwen3ForCausalLM, task: ChainTask, size: int, seed: int, temperature: float
) -> list[Example]:
    """Return the teacher's samples, right or wrong, on the first training problems."""
    generator = torch.Generator().manual_seed(seed)
    pool: list[Example] = []
    started = time.perf_counter()
    while len(pool) < size:
        indices = range(len(pool), min(len(pool) + SAMPLING_BATCH, size))
        problems = [task.problem("train", index) for index in indices]
        prompts = [prompt_tokens(p.text) for p in problems]
        responses = sample(teacher, prompts, generator, temperature)
        pool += [sampled_example(p, r) for p, r in zip(problems, responses, strict=True)]
        report("samples", len(pool), size, started)
    return pool


def make_teacher(directory: Path, task: ChainTask, seed: int) -> None:
    """Train the teacher on worked solutions, with repaired errors, and save it."""
    torch.manual_seed(seed)
    model = build_model(TEACHER_SHAPE)
    train(model, worked_batches(task, TEACHER_SCHEDULE, seed), TEACHER_SCHEDULE, "teacher steps")
    save_model(model, directory)


def make_student(
    directory: Path,
    pool: list[Example],
    schedule: Schedule,
    seed: int,
) -> None:
    """Train a student on a pool of the teacher's samples and save it."""
    torch.manual_seed(seed + 1)
    model = build_model(STUDENT_SHAPE)
    train(model, pool_batches(pool, schedule, seed), schedule, f"{directory.name} steps")
    save_model(model, directory)


def evaluate_all(output: Path, task: ChainTask, seed: int, problems: int) -> dict[str, Any]:
    """Evaluate the saved models and write metrics.json next to them."""
    metrics: dict[str, Any] = {
        "seed": seed,
        "temperature": 1.0,
        "warm_start_temperature": WARM_START_TEMPERATURE,
        "beginner_temperature": BEGINNER_TEMPERATURE,
        "beginner_samples": BEGINNER_POOL_SIZE,
        "eval_problems": problems,
        "task": asdict(task),
    }
    for name, schedule in (
        ("teacher", TEACHER_SCHEDULE),
        ("student", STUDENT_SCHEDULE),
        ("beginner", BEGINNER_SCHEDULE),
    ):
        model = load_model(output / name)
        greedy = evaluate(model, task, problems=problems, seed=seed, temperature=NEAR_GREEDY)
        metrics[name] = {
            **evaluate(model, task, problems=problems, seed=seed),
            "greedy_accuracy": greedy["accuracy"],
            "parameters": sum(p.numel() for p in model.parameters()),
            "weight_bytes": (output / name / "model.safetensors").stat().st_size,
            "schedule": asdict(schedule),
        }
        print(f"{name}: {metrics[name]}", flush=True)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("models/lab"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="part of what fixes the result")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--eval-problems", type=int, default=2000)
    return parser.parse_args()


def main() -> None:
    """Run the chosen stages in order."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    settle_vector_math()
    task = ChainTask()
    teacher, student, beginner = (
        arguments.output / name for name in ("teacher", "student", "beginner")
    )
    if "tokenizer" in arguments.stages:
        for directory in (teacher, student, beginner):
            write_tokenizer(directory)
    if "teacher" in arguments.stages:
        make_teacher(teacher, task, arguments.seed)
    if "student" in arguments.stages:
        samples = (SAMPLE_POOL_SIZE, arguments.seed, WARM_START_TEMPERATURE)
        pool = draw_sample_pool(load_model(teacher), task, *samples)
        make_student(student, pool, STUDENT_SCHEDULE, arguments.seed)
    if "beginner" in arguments.stages:
        samples = (BEGINNER_POOL_SIZE, arguments.seed, BEGINNER_TEMPERATURE)
        pool = draw_sample_pool(load_model(teacher), task, *samples)
        make_student(beginner, pool, BEGINNER_SCHEDULE, arguments.seed)
    if "evaluate" in arguments.stages:
        for directory in (teacher, student, beginner):
            check_tokenizer(directory)
        evaluate_all(arguments.output, task, arguments.seed, arguments.eval_problems)


if __name__ == "__main__":
    main()
