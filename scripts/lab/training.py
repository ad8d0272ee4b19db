"""The training loop of the lab models."""

import math
import time
from collections.abc import Iterator
from itertools import islice

import torch
from torch.nn import functional as F
from transformers import Qwen3ForCausalLM

from lab.examples import IGNORED, Example, collate
from lab.settings import Schedule


def learning_rate_factor(step: int, schedule: Schedule) -> float:
    """Return the share of the peak learning rate used at a step."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / (schedule.steps - schedule.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: Qwen3ForCausalLM,
    batches: Iterator[list[Example]],
    schedule: Schedule,
    name: str,
) -> None:
    """Minimise the next-token cross entropy over the targets of each batch."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=schedule.learning_rate,
        betas=(0.9, schedule.beta2),
        weight_decay=schedule.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, schedule)
    )
    model.train()
    started = time.perf_counter()
    for step, examples in enumerate(islice(batches, schedule.stop_after), start=1):
        inputs, targets = collate(examples)
        # Padding is on the right, so causal attention alone keeps it out of every loss position.
        logits = model(input_ids=inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0 or step == schedule.steps:
            report(name, step, schedule.steps, started, f"  loss {float(loss.detach()):.4f}")
    model.eval()


def report(name: str, done: int, total: int, started: float, extra: str = "") -> None:
    """Print progress with the rate since `started` and the estimated time left."""
    rate = done / (time.perf_counter() - started)
    left = (total - done) / rate
    print(f"{name}: {done}/{total}  {rate:.2f}/s  ETA {left:.0f} s{extra}", flush=True)
