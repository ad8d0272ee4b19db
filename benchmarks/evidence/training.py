"""Plain supervised training of the evidence's models, on any device.

Shape letters: B rows of a batch, T positions.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from benchmarks.evidence.settings import Shape
from qwen3_distill.config import TaskName
from qwen3_distill.data.tasks import TASKS
from qwen3_distill.modeling.loading import load_model, resolve_device
from qwen3_distill.recording.text import duration
from scripts.lab.tokenizer import (
    ASSISTANT_ID,
    CONTEXT_LENGTH,
    END_ID,
    PAD_ID,
    VOCAB_SIZE,
    prompt_tokens,
    write_tokenizer,
)

IGNORED = -100
_AHEAD = 24
"""Batches that are made before they are needed."""


@dataclass(frozen=True)
class Example:
    """Token ids of one chat and its targets (`IGNORED` where no loss is taken)."""

    tokens: list[int]
    targets: list[int]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """AdamW with a linear warm-up and a cosine decay to a tenth."""

    steps: int
    learning_rate: float
    warmup_steps: int

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def build_model(shape: Shape, device: torch.device) -> Qwen3ForCausalLM:
    """Return a freshly initialised float32 model; draws from torch's global generator."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=32,
        initializer_range=0.04,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=shape.tied,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
        bos_token_id=None,
    )
    model: Any = Qwen3ForCausalLM(config)
    return model.to(device)


def save_bfloat16(model: Qwen3ForCausalLM, directory: Path) -> None:
    """Write the model rounded to bfloat16, with the lab's tokenizer. What is on disk counts."""
    write_tokenizer(directory)
    weights = {
        name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()
    }
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
    )
    rounded: Any = Qwen3ForCausalLM(model.config)
    rounded.to(torch.bfloat16).load_state_dict(weights)
    rounded.generation_config = model.generation_config
    rounded.save_pretrained(directory)


def worked_example(task_name: TaskName, index: int, seed: int) -> Example:
    """Return a training problem with a worked solution in which errors are repaired."""
    task = TASKS[task_name]
    problem = task.problem("train", index)
    prompt = prompt_tokens(problem.text)
    tokens, targets = list(prompt), [IGNORED] * len(prompt)
    rng = random.Random(f"errors/{seed}/{index}")
    for segment in task.solution_segments(problem, rng):
        ids = list(segment.text.encode())
        tokens += ids
        targets += [IGNORED] * len(ids) if segment.is_error else ids
    return Example([*tokens, END_ID], [*targets, END_ID])


def collate(examples: Sequence[Example]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pad on the right to [B, T] inputs and next-token targets; T is a multiple of 16."""
    width = -(-(max(len(example.tokens) for example in examples) - 1) // 16) * 16
    inputs = np.full((len(examples), width), PAD_ID, dtype=np.int64)
    targets = np.full((len(examples), width), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example.tokens) - 1
        inputs[row, :length] = example.tokens[:-1]
        targets[row, :length] = example.targets[1:]
    return inputs, targets


def worked_batch(
    task_name: TaskName, number: int, rows: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return batch ``number`` of fresh problems."""
    first = number * rows
    return collate([worked_example(task_name, first + row, seed) for row in range(rows)])


def worked_batches(
    pool: Executor, parts: Sequence[tuple[TaskName, int]], steps: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield batches of the parts in turn, made ahead in the pool's processes.

    Args:
        parts: a task and its rows per batch, one after another; a part may appear more than once.
    """
    waiting: list[Future[tuple[NDArray[np.int64], NDArray[np.int64]]]] = []
    for number in range(steps + _AHEAD):
        if number < steps:
            task, rows = parts[number % len(parts)]
            waiting.append(pool.submit(worked_batch, task, number, rows, seed))
        if number >= _AHEAD or number >= steps:
            if not waiting:
                return
            yield waiting.pop(0).result()


def train(
    model: Qwen3ForCausalLM,
    batches: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]],
    schedule: Schedule,
    name: str,
    stop: Callable[[int], bool] = lambda step: False,
) -> int:
    """Minimise the cross entropy over the targets; return the steps taken.

    Args:
        stop: asked after each step, with the number of steps so far.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    model.train()
    started, step = time.perf_counter(), 0
    for step, (inputs, targets) in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step - 1)
        input_BT = torch.from_numpy(inputs).to(device)
        target_BT = torch.from_numpy(targets).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=input_BT).logits
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), target_BT.flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == schedule.steps:
            rate = step / (time.perf_counter() - started)
            left = duration((schedule.steps - step) / rate)
            print(
                f"{name}: {step}/{schedule.steps} {rate:.1f}/s ETA {left} loss {loss.item():.4f}",
                flush=True,
            )
        if stop(step):
            break
    model.eval()
    return step


def loss_on(student: Path, warm_data: Path, device: str) -> float:
    """Mean negative logprob, in nats per token, of held-out answers of the warm start's kind."""
    where = resolve_device(device)
    model = load_model(student, device=where, dtype=torch.float32)
    total, count = 0.0, 0
    sequences: list[list[int]] = json.loads(warm_data.read_text())
    with torch.inference_mode():
        for ids in sequences:
            tokens = torch.tensor([ids], device=where)
            logprobs = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
            start = ids.index(ASSISTANT_ID)  # the answer follows the mark
            taken = logprobs.gather(-1, tokens[0, 1:, None])[start:, 0]
            total -= float(taken.sum())
            count += len(taken)
    return total / count
