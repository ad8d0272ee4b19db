"""Training examples and their batches."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice

import torch

from lab.settings import GROUPED_BATCHES, Schedule
from lab.tokenizer import END_ID, PAD_ID, prompt_tokens
from qwen3_distill.data.chain_task import ChainTask, Problem

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Token ids of one chat and its training targets (`IGNORED` where no loss is taken)."""

    tokens: list[int]
    targets: list[int]


def worked_example(task: ChainTask, index: int, seed: int) -> Example:
    """Return training problem `index` with a worked solution in which errors are repaired."""
    problem = task.problem("train", index)
    rng = random.Random(f"errors/{seed}/{index}")
    prompt = prompt_tokens(problem.text)
    tokens, targets = list(prompt), [IGNORED] * len(prompt)
    for segment in task.solution_segments(problem, rng):
        ids = list(segment.text.encode())
        tokens += ids
        targets += [IGNORED] * len(ids) if segment.is_error else ids
    return Example([*tokens, END_ID], [*targets, END_ID])


def sampled_example(problem: Problem, response: list[int]) -> Example:
    """Return a problem with a sampled response, all of whose tokens are targets."""
    prompt = prompt_tokens(problem.text)
    return Example([*prompt, *response], [*[IGNORED] * len(prompt), *response])


def worked_batches(task: ChainTask, schedule: Schedule, seed: int) -> Iterator[list[Example]]:
    """Yield batches of fresh training problems with worked solutions."""
    indices = range(schedule.steps * schedule.batch_size)
    examples = (worked_example(task, index, seed) for index in indices)
    return length_grouped(examples, schedule.batch_size, seed)


def length_grouped(
    examples: Iterable[Example], batch_size: int, seed: int
) -> Iterator[list[Example]]:
    """Yield full batches of similar length, in random order within every `GROUPED_BATCHES`.

    Padding would otherwise be more than a quarter of all positions.
    """
    rng = random.Random(seed)
    source = iter(examples)
    while group := list(islice(source, GROUPED_BATCHES * batch_size)):
        group.sort(key=lambda example: len(example.tokens))
        batches = [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        rng.shuffle(batches)
        yield from batches


def pool_batches(pool: list[Example], schedule: Schedule, seed: int) -> Iterator[list[Example]]:
    """Yield batches out of a pool, reshuffled after every full pass."""
    rng = random.Random(seed)
    passes = (example for _ in count() for example in rng.sample(pool, len(pool)))
    examples = islice(passes, schedule.steps * schedule.batch_size)
    return length_grouped(examples, schedule.batch_size, seed)


def collate(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right to two int64 tensors [batch, time] of inputs and next-token targets."""
    width = max(len(example.tokens) for example in examples) - 1
    inputs = torch.full((len(examples), width), PAD_ID)
    targets = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        length = len(example.tokens) - 1
        inputs[row, :length] = torch.tensor(example.tokens[:-1])
        targets[row, :length] = torch.tensor(example.targets[1:])
    return inputs, targets
