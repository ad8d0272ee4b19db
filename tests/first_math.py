"""Prints the size of the first tensor that a process gives to each math function.

    python -m tests.first_math KIND STUDENT TEACHER

It is a program because only the first call in a process matters.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3_distill.config import (
    EmbeddedGeneration,
    EmbeddedScoring,
    EmbeddedTraining,
    SampledReverseKL,
)
from qwen3_distill.generation.embedded.worker import EmbeddedRolloutWorker
from qwen3_distill.modeling.known_answer import known_tokens, layerwise_logprobs
from qwen3_distill.scoring.embedded.worker import EmbeddedTeacherWorker
from qwen3_distill.training.embedded.worker import EmbeddedLearnerWorker
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.types import Batch, Rollout, SampledRequest, ScoredRollout, TeacherScore
from tests.contract.builders import (
    directory_weights,
    jobs_of,
    published,
    ragged_requests,
    run,
    synthetic_rollout,
)

VECTOR_MATH = {
    *("cos", "sin", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "tanh", "erf", "sigmoid"),
    *("silu", "pow", "logaddexp", "softmax", "log_softmax", "logsumexp"),
}


class FirstCalls(TorchDispatchMode):
    """Records the size of the first tensor of each function."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.strip("_")
        if name in VECTOR_MATH:
            sizes = [part.numel() for part in args if isinstance(part, torch.Tensor)]
            self.sizes.setdefault(name, max(sizes, default=1))
        return func(*args, **(kwargs or {}))


def sample(student: Path, teacher: Path) -> None:
    worker = EmbeddedRolloutWorker()
    worker.open(str(student), EmbeddedGeneration(kind="embedded", device="cpu"))

    async def generate() -> None:
        await worker.load(*published(directory_weights(student)))
        _ = [rollout async for rollout in worker.generate(ragged_requests())]

    run(generate())


def score(student: Path, teacher: Path) -> None:
    worker = EmbeddedTeacherWorker()
    config = EmbeddedScoring(kind="embedded", device="cpu", model=str(teacher))
    worker.open(config, SampledRequest())
    run(worker.score(jobs_of(rollouts())))


def train(student: Path, teacher: Path) -> None:
    worker = EmbeddedLearnerWorker()
    worker.open(
        LearnerSettings(
            model_dir=student,
            training=EmbeddedTraining(kind="embedded", device="cpu"),
            objective=SampledReverseKL(kind="sampled_reverse_kl"),
            total_steps=9,
            seed=0,
        )
    )
    scored = [
        ScoredRollout(
            rollout=rollout,
            score=TeacherScore(teacher_id="t", logprobs=rollout.behavior_logprobs),
        )
        for rollout in rollouts()
    ]
    run(worker.update(Batch.uniform(scored)))


def answer(student: Path, teacher: Path) -> None:
    layerwise_logprobs(teacher, known_tokens(teacher))


def rollouts() -> list[Rollout]:
    return [synthetic_rollout(9, 16, seed) for seed in range(8)]


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "engine": sample,
    "teacher": score,
    "learner": train,
    "known answer": answer,
}

if __name__ == "__main__":
    with FirstCalls() as calls:
        KINDS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.write(json.dumps(calls.sizes) + "\n")
