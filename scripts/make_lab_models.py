"""Train the lab models: a small teacher, and a student warm-started on the teacher's samples.

Both are plain `Qwen3ForCausalLM` directories for the task in `qwen3_distill.data.chain_task`. The
script is deterministic for a given seed, thread count and machine:

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
    SAMPLE_POOL_SIZE,
    SAMPLING_BATCH,
    STUDENT_SCHEDULE,
    STUDENT_SHAPE,
    TEACHER_SCHEDULE,
    TEACHER_SHAPE,
    WARM_START_TEMPERATURE,
)
from lab.tokenizer import check_tokenizer, prompt_tokens, write_tokenizer
from lab.training import report, train
from qwen3_distill.data.chain_task import ChainTask
from qwen3_distill.modeling.cpu_warmup import settle_vector_math

STAGES = ("tokenizer", "teacher", "student", "evaluate")


def draw_sample_pool(
    teacher: Qwen3ForCausalLM, task: ChainTask, size: int, seed: int
) -> list[Example]:
    """Return the teacher's tempered samples, right or wrong, on the first training problems."""
    generator = torch.Generator().manual_seed(seed)
    pool: list[Example] = []
    started = time.perf_counter()
    while len(pool) < size:
        indices = range(len(pool), min(len(pool) + SAMPLING_BATCH, size))
        problems = [task.problem("train", index) for index in indices]
        prompts = [prompt_tokens(p.text) for p in problems]
        responses = sample(teacher, prompts, generator, WARM_START_TEMPERATURE)
        pool += [sampled_example(p, r) for p, r in zip(problems, responses, strict=True)]
        report("samples", len(pool), size, started)
    return pool


def make_teacher(directory: Path, task: ChainTask, seed: int) -> None:
    """Train the teacher on worked solutions, with repaired errors, and save it."""
    torch.manual_seed(seed)
    model = build_model(TEACHER_SHAPE)
    train(model, worked_batches(task, TEACHER_SCHEDULE, seed), TEACHER_SCHEDULE, "teacher steps")
    save_model(model, directory)


def make_student(directory: Path, teacher_directory: Path, task: ChainTask, seed: int) -> None:
    """Train the student on the teacher's tempered samples and save it."""
    pool = draw_sample_pool(load_model(teacher_directory), task, SAMPLE_POOL_SIZE, seed)
    torch.manual_seed(seed + 1)
    model = build_model(STUDENT_SHAPE)
    batches = pool_batches(pool, STUDENT_SCHEDULE, seed)
    train(model, batches, STUDENT_SCHEDULE, "student steps")
    save_model(model, directory)


def evaluate_pair(output: Path, task: ChainTask, seed: int, problems: int) -> dict[str, Any]:
    """Evaluate both saved models and write metrics.json next to them."""
    metrics: dict[str, Any] = {
        "seed": seed,
        "temperature": 1.0,
        "warm_start_temperature": WARM_START_TEMPERATURE,
        "eval_problems": problems,
        "task": asdict(task),
    }
    for name, schedule in (("teacher", TEACHER_SCHEDULE), ("student", STUDENT_SCHEDULE)):
        model = load_model(output / name)
        metrics[name] = {
            **evaluate(model, task, problems=problems, seed=seed),
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
    teacher, student = arguments.output / "teacher", arguments.output / "student"
    if "tokenizer" in arguments.stages:
        for directory in (teacher, student):
            write_tokenizer(directory)
    if "teacher" in arguments.stages:
        make_teacher(teacher, task, arguments.seed)
    if "student" in arguments.stages:
        make_student(student, teacher, task, arguments.seed)
    if "evaluate" in arguments.stages:
        for directory in (teacher, student):
            check_tokenizer(directory)
        evaluate_pair(arguments.output, task, arguments.seed, arguments.eval_problems)


if __name__ == "__main__":
    main()
