"""Trains the models of the cost comparison: a teacher and a weaker one, and a student per setting.

    python -m benchmarks.evidence.make_models --out runs/evidence/models
    python -m benchmarks.evidence.make_models --sizes cpu --settings short --out ...

One teacher knows all three tasks; it is trained on worked solutions. The weak teacher has the
student's shape, and its training ends at three quarters of the problems. Each student is
warm-started on a limited number of the teacher's answers at temperature 1, until its greedy
accuracy on validation problems reaches 40%. Weights are written in bfloat16, and what is written is
what `models.json` gives the accuracy of. A stage whose files are there is not repeated.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen3ForCausalLM

from benchmarks.evidence.settings import (
    CPU,
    GPU,
    HELDOUT,
    MODELS,
    SETTINGS,
    VALIDATION_FIRST,
    WARM_FIRST,
    WARM_TARGET,
    WEAK_TARGET,
    Setting,
    Shape,
    Sizes,
)
from benchmarks.evidence.training import (
    IGNORED,
    Example,
    Schedule,
    build_model,
    collate,
    loss_on,
    save_bfloat16,
    train,
    worked_batches,
)
from qwen3_distill.config import TaskName
from qwen3_distill.data.chain_task import Problem, Split
from qwen3_distill.data.tasks import TASKS
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import resolve_device
from qwen3_distill.ports import FullWeights
from qwen3_distill.types import (
    FinishReason,
    Prompt,
    Rollout,
    RolloutRequest,
    SamplingSpec,
    WeightVersion,
)
from qwen3_distill.utils.files import write_json_atomic
from qwen3_distill.weights.directory import publish_directory
from qwen3_distill.weights.memory import MemoryChannel
from scripts.lab.tokenizer import END_ID, prompt_tokens

VALIDATION = 512
BATCHING: Literal["static", "continuous"] = "static"
"""How answers are sampled; ``continuous`` where no graph can be captured."""
_CHECK_EVERY, _WEAK_CHECK_EVERY = 5, 100
_FINISHED = "finished"
"""File that a teacher's directory has when its training has ended."""


class Answers:
    """Samples a model directory's answers to a task's problems, with the embedded engine."""

    def __init__(self, directory: Path, device: str) -> None:
        self._engine = EmbeddedRolloutEngine(
            directory, device=device, dtype="float32", max_sequences=2048, batching=BATCHING
        )
        self._channel = MemoryChannel()
        version = publish_directory(directory, self._channel, dtype=torch.float32)
        asyncio.run(self._engine.load(version, self._channel))

    def use(self, model: Qwen3ForCausalLM, step: int) -> None:
        """Answer with a model's weights from now on, rounded as they are saved."""
        tensors = {n: p.detach().bfloat16().float() for n, p in model.named_parameters()}
        version = WeightVersion(step=step, digest=weights_digest(tensors))
        self._channel.publish(version, FullWeights(tensors=tensors))
        asyncio.run(self._engine.load(version, self._channel))

    def sample(
        self, setting: Setting, problems: Sequence[Problem], temperature: float, seed: int
    ) -> list[Rollout]:
        """Return one answer per problem, in order."""
        requests = [
            RolloutRequest(
                rollout_id=str(index),
                prompt=Prompt(
                    prompt_id=problem.problem_id,
                    token_ids=np.array(prompt_tokens(problem.text), dtype=np.int32),
                ),
                sampling=SamplingSpec(
                    temperature=temperature,
                    top_p=1.0,
                    top_k=0,
                    max_new_tokens=setting.max_new_tokens,
                    seed=seed * 1_000_003 + index,
                ),
            )
            for index, problem in enumerate(problems)
        ]

        async def collect() -> list[Rollout]:
            return [rollout async for rollout in self._engine.generate(requests)]

        found = {rollout.rollout_id: rollout for rollout in asyncio.run(collect())}
        return [found[request.rollout_id] for request in requests]

    def accuracy(
        self, setting: Setting, split: Split, first: int, count: int, temperature: float
    ) -> dict[str, float]:
        """Return accuracy, mean length, the share of answers that ended, and the tokens per second
        of sampling them."""
        task = TASKS[setting.task]
        problems = [task.problem(split, first + index) for index in range(count)]
        started = time.perf_counter()
        rollouts = self.sample(setting, problems, temperature, seed=1)
        taken_s = time.perf_counter() - started
        right = [task.check(p, _text(r)) for p, r in zip(problems, rollouts, strict=True)]
        return {
            "tokens_per_s": sum(rollout.num_tokens for rollout in rollouts) / taken_s,
            "accuracy": sum(right) / count,
            "mean_tokens": sum(rollout.num_tokens for rollout in rollouts) / count,
            "ended": sum(r.finish_reason is FinishReason.STOP for r in rollouts) / count,
        }


def _text(rollout: Rollout) -> str:
    """The answer without its end token; another special token stays visible."""
    ids = [int(token) for token in rollout.response_ids]
    ids = ids[:-1] if ids and ids[-1] == END_ID else ids
    return "".join(chr(token) if token < 256 else "\N{REPLACEMENT CHARACTER}" for token in ids)


def make_teacher(
    directory: Path,
    shape: Shape,
    steps: int,
    names: Sequence[str],
    pool: Executor,
    device: str,
    *,
    rows_divisor: int,
    target: float | None,
) -> None:
    """Train one model on the settings' tasks, batch by batch in turn, and save it.

    Args:
        rows_divisor: divides the settings' rows of a batch.
        target: end when the mean accuracy at temperature 1 over the settings has reached it.
    """
    torch.manual_seed(0)
    model = build_model(shape, resolve_device(device))
    parts: list[tuple[TaskName, int]] = [
        (SETTINGS[name].task, SETTINGS[name].teacher_rows // rows_divisor)
        for name in names
        for _ in range(SETTINGS[name].teacher_batches)
    ]
    schedule = Schedule(steps=steps, learning_rate=1.5e-3, warmup_steps=min(200, steps // 5))
    save_bfloat16(model, directory)
    answers = Answers(directory, device)

    def stop(step: int) -> bool:
        if target is None or step % _WEAK_CHECK_EVERY:
            return False
        answers.use(model, step)
        found = [
            answers.accuracy(SETTINGS[name], "train", VALIDATION_FIRST, VALIDATION, 1.0)["accuracy"]
            for name in names
        ]
        print(f"{directory.name}: step {step}, at temperature 1 {found}", flush=True)
        return sum(found) / len(found) >= target

    train(model, worked_batches(pool, parts, steps, seed=0), schedule, directory.name, stop)
    save_bfloat16(model, directory)
    (directory / _FINISHED).touch()


def make_student(
    directory: Path, teacher: Path, setting: Setting, sizes: Sizes, device: str
) -> None:
    """Warm-start a student on the teacher's answers until the target accuracy, and save it."""
    task = TASKS[setting.task]
    problems = [task.problem("train", WARM_FIRST + i) for i in range(setting.warm_samples)]
    answers = Answers(teacher, device).sample(setting, problems, 1.0, seed=2)
    examples = [_example(p, r) for p, r in zip(problems, answers, strict=True)]
    torch.manual_seed(1)
    model = build_model(sizes.student, resolve_device(device))
    save_bfloat16(model, directory)
    student = Answers(directory, device)
    reached: dict[str, float] = {}

    def stop(step: int) -> bool:
        if step % _CHECK_EVERY:
            return False
        student.use(model, step)
        found = student.accuracy(setting, "train", VALIDATION_FIRST, VALIDATION, 0.0)
        print(f"{directory.parent.name}: step {step}, greedy {found['accuracy']:.3f}", flush=True)
        reached.update(steps=step, validation_accuracy=found["accuracy"])
        return found["accuracy"] >= WARM_TARGET

    # A constant rate: a decay would have to know when the target is reached.
    schedule = Schedule(steps=sizes.warm_steps, learning_rate=1e-3, warmup_steps=50)
    batches = _epochs(examples, setting.rollouts_per_step, sizes.warm_steps)
    train(model, batches, schedule, f"{directory.parent.name} student", stop)
    save_bfloat16(model, directory)
    write_json_atomic(
        directory.parent / "warm_start.json", {"samples": setting.warm_samples, **reached}
    )
    write_json_atomic(
        directory.parent / "warm_data.json",
        [example.tokens for example in _held_out(teacher, setting, device)],
    )


def _held_out(teacher: Path, setting: Setting, device: str) -> list[Example]:
    """256 more answers of the teacher, for the loss that measures forgetting."""
    task = TASKS[setting.task]
    first = WARM_FIRST + setting.warm_samples
    problems = [task.problem("train", first + index) for index in range(256)]
    answers = Answers(teacher, device).sample(setting, problems, 1.0, seed=3)
    return [_example(p, r) for p, r in zip(problems, answers, strict=True)]


def _example(problem: Problem, rollout: Rollout) -> Example:
    prompt = prompt_tokens(problem.text)
    response = [int(token) for token in rollout.response_ids]
    return Example([*prompt, *response], [*[IGNORED] * len(prompt), *response])


def _epochs(
    examples: Sequence[Example], rows: int, steps: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    rng = random.Random(0)
    passes = (example for _ in itertools.count() for example in rng.sample(examples, len(examples)))
    for _ in range(steps):
        yield collate(list(itertools.islice(passes, rows)))


def describe(out: Path, names: Sequence[str], device: str) -> dict[str, Any]:
    """Measure all models on held-out problems, at both temperatures."""
    record: dict[str, Any] = {"heldout": HELDOUT, "settings": {}}
    for name in names:
        setting = SETTINGS[name]
        rows: dict[str, Any] = {"setting": asdict(setting)}
        file = out / name / "warm_start.json"
        rows["warm_start"] = json.loads(file.read_text())
        student = out / name / "student"
        rows["warm_data_loss"] = loss_on(student, out / name / "warm_data.json", device)
        for role, directory in (
            ("teacher", out / "teacher"),
            ("weak_teacher", out / "weak_teacher"),
            ("student", student),
        ):
            answers = Answers(directory, device)
            rows[role] = {
                f"temperature_{temperature:g}": answers.accuracy(
                    setting, "eval", 0, HELDOUT, temperature
                )
                for temperature in (0.0, 1.0)
            }
            print(f"{name} {role}: {rows[role]}", flush=True)
        record["settings"][name] = rows
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=MODELS)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--sizes", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--data-workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--teacher-steps", type=int, help="default: the sizes' own")
    parser.add_argument("--weak-steps", type=int, help="likewise")
    parser.add_argument("--warm-steps", type=int, help="likewise")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    sizes = GPU if arguments.sizes == "gpu" else CPU
    sizes = replace(
        sizes,
        teacher_steps=arguments.teacher_steps or sizes.teacher_steps,
        weak_steps=arguments.weak_steps or sizes.weak_steps,
        warm_steps=arguments.warm_steps or sizes.warm_steps,
    )
    out, device = arguments.out, arguments.device
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with ProcessPoolExecutor(arguments.data_workers, get_context("spawn")) as pool:
        for role, shape, count, target in (
            ("teacher", sizes.teacher, sizes.teacher_steps, None),
            ("weak_teacher", sizes.student, sizes.weak_steps, WEAK_TARGET),
        ):
            if not (out / role / _FINISHED).is_file():
                make_teacher(
                    out / role,
                    shape,
                    count,
                    arguments.settings,
                    pool,
                    device,
                    rows_divisor=sizes.rows_divisor,
                    target=target,
                )
    for name in arguments.settings:
        if not (out / name / "warm_data.json").is_file():
            student = out / name / "student"
            make_student(student, out / "teacher", SETTINGS[name], sizes, device)
    record = describe(out, arguments.settings, device)
    record |= {"sizes": asdict(sizes), "wall_s": time.perf_counter() - started}
    write_json_atomic(out / "models.json", record)
    print(out / "models.json")


if __name__ == "__main__":
    main()
