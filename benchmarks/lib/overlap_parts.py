"""Parts of `overlap.py`: lengths of rollouts, measuring plans, and the comparison of runs."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen3_distill.utils.seeds import derive_seed

Z_99 = 2.326348
DEFAULT_SKIP = 3
FEWEST_STEPS = 3
"""Smallest number of steps for a comparison."""


@dataclass(frozen=True)
class Lengths:
    """Draws the number of new tokens of a rollout from its id."""

    name: str
    median_tokens: int
    max_tokens: int

    first_step: int = 0
    """First step of the run; counted from it, so that every run draws the same lengths."""

    def of(self, rollout_id: str) -> int:
        if self.name == "fixed":
            return self.median_tokens
        ratio = float(self.name.removeprefix("longtail"))
        step, _, rest = rollout_id.removeprefix("step-").partition("/")
        seed = derive_seed(0, "length", int(step) - self.first_step, rest)
        normal = np.random.Generator(np.random.PCG64(seed)).standard_normal()
        tokens = self.median_tokens * math.exp(normal * math.log(ratio) / Z_99)
        return int(min(max(tokens, 1), self.max_tokens))


@dataclass(frozen=True)
class Plan:
    """The steps to measure with one distribution of lengths."""

    name: str
    sequential_steps: int
    streaming_steps: int
    skip: int = DEFAULT_SKIP
    """First streaming steps, which do not count because the stages are still filling."""

    @classmethod
    def parse(cls, text: str) -> list["Plan"]:
        """Parse ``NAME:SEQUENTIAL:STREAMING[:SKIP],...``."""
        fields = [item.split(":") for item in text.split(",") if item]
        return [cls(name, *map(int, counts)) for name, *counts in fields]


@dataclass(frozen=True)
class Variant:
    """One distribution of lengths, streamed with another setting of `pipeline`."""

    name: str
    streaming_steps: int
    setting: str

    @classmethod
    def parse(cls, text: str) -> list["Variant"]:
        """Parse ``NAME:STREAMING:SETTING=VALUE,...``."""
        fields = [item.split(":", 2) for item in text.split(",") if item]
        if any(setting.startswith("mps=") for _, _, setting in fields):
            raise argparse.ArgumentTypeError("the engines run already: --other-mps measures MPS")
        return [cls(name, int(steps), setting) for name, steps, setting in fields]


def rate_of_common_steps(one: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """Return the ratio of tokens per second of two runs, over the steps that count in both.

    Early steps of long-tailed lengths have fewer tokens, so only the same steps may be compared.
    None if fewer than `FEWEST_STEPS` count in both.
    """
    first = max(one["skipped_steps"], other["skipped_steps"])
    steps = [run["tokens_and_seconds_of_steps"] for run in (one, other)]
    last = min(map(len, steps))
    if last - first < FEWEST_STEPS:
        return None
    sums = [np.sum(run[first:last], axis=0) for run in steps]
    return float(sums[0][0] / sums[0][1] / (sums[1][0] / sums[1][1]))


def means_of_steps(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the means of the stages' times, idle shares and queues, and of what some steps have.

    Shares and queues are means over time: short and long steps may follow each other. A load
    beside a step has its mean over the steps in which one ended. How far the learner is from
    the engine says whether the engine computes what it should, however fast.
    """
    seconds = [step["time/step_s"] for step in steps]
    found = {}
    for key in steps[-1]:
        values = [step.get(key) or 0.0 for step in steps]
        if key.startswith("time/") or key.endswith("_max"):
            found[key] = float(np.mean(values))
        elif key.startswith(("idle/", "queue/")):
            found[key] = float(np.average(values, weights=seconds))
    for key in ("weights/load_s", "health/learner_vs_engine_abs_nats"):
        if there := [step[key] for step in steps if step.get(key) is not None]:
            found[key] = float(np.mean(there))
    return found
