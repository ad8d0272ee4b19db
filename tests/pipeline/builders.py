"""Builds configs over the tiny models, runs them and reads their files."""

import asyncio
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import yaml

from qwen3_distill.cli import main as cli
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import check_config
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.recording.jsonl import read_jsonl
from tests.tiny_models import TinyModels

Values: TypeAlias = dict[str, Any]

TASK_PROMPTS: Values = {"kind": "task", "limit": 5}
SAMPLED: Values = {"kind": "sampled_reverse_kl"}
TOP_K: Values = {"kind": "top_k", "k": 4}
FULL: Values = {"kind": "full"}
TASK_REWARD: Values = {
    "objective": {"kind": "sampled_reverse_kl", "task_reward_weight": 0.5},
    "verifier": {"kind": "task"},
}
LORA: Values = {"kind": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.1}
EVALUATION: Values = {
    "prompts": {"kind": "task", "split": "eval"},
    "verifier": {"kind": "task"},
    "every_steps": 2,
    "num_problems": 3,
    "samples_per_problem": 2,
    "sampling": {"max_new_tokens": 8},
}


def tiny_values(
    models: TinyModels, output_dir: Path, changes: Mapping[str, Any] | None = None
) -> Values:
    """Raw values of a valid config: four steps of two prompts with two samples each.

    Args:
        changes: Settings by dotted key, e.g. ``{"sampling.max_new_tokens": 4}``.
    """
    values: Values = {
        "output_dir": str(output_dir),
        "steps": 4,
        "prompts_per_step": 2,
        "samples_per_prompt": 2,
        "student": {"model": str(models.student)},
        "prompts": dict(TASK_PROMPTS),
        "sampling": {"max_new_tokens": 8},
        "generation": {"kind": "embedded", "device": "cpu"},
        "scoring": {"kind": "embedded", "model": str(models.teacher), "device": "cpu"},
        "training": {
            "kind": "embedded",
            "device": "cpu",
            "tuning": {"kind": "full"},
            "optimizer": {"learning_rate": 1e-3},
        },
        "objective": dict(SAMPLED),
        "checkpoint": {"every_steps": 2},
        "logging": {"tensorboard": False, "rollouts_every_steps": 2, "rollouts_per_save": 3},
    }
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    return values


def tiny_config(
    models: TinyModels, output_dir: Path, changes: Mapping[str, Any] | None = None
) -> RunConfig:
    """`tiny_values`, checked."""
    return check_config(tiny_values(models, output_dir, changes))


def write_config(path: Path, values: Values) -> Path:
    """Write a config file; return its path."""
    path.write_text(yaml.safe_dump(values))
    return path


@dataclass
class RecordingReporter(SilentReporter):
    """Records what a run reports to its user."""

    stages: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        self.steps.append(step)


def raise_warning(message: str) -> None:
    """A ``warn`` for runs that must not warn."""
    raise AssertionError(f"unexpected warning: {message}")


def run_to_end(config: RunConfig, warn: Callable[[str], None] = raise_warning) -> RecordingReporter:
    """Run in this process until the run is complete."""
    reporter = RecordingReporter()
    assert run(config, reporter, warn)
    return reporter


def student_bytes(folder: Path) -> bytes:
    """The trained weights, for bitwise comparison."""
    return (folder / "student" / "model.safetensors").read_bytes()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def timeless(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file without the fields that depend on a clock."""
    return [
        {key: value for key, value in record.items() if not _is_time(key)}
        for record in read_jsonl(path)
    ]


def _is_time(key: str) -> bool:
    clocks = key in ("wall_s", "cost/device_s") or key.endswith("_tok_s")
    return clocks or key.startswith(("time/", "idle/", "queue/"))


def same_result(left: Path, right: Path) -> bool:
    """Whether two run folders hold the same student, metrics and evaluations, bit for bit."""
    return student_bytes(left) == student_bytes(right) and all(
        timeless(left / name) == timeless(right / name)
        for name in ("metrics.jsonl", "evaluations.jsonl")
    )


@dataclass(frozen=True)
class CliResult:
    """A command's exit status and output."""

    code: int
    out: str
    err: str


def call_cli(*arguments: str | Path) -> CliResult:
    """Call the command line in this process; an exception that would be a traceback is raised."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        patch.object(sys, "argv", ["qwen3-distill", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code or 0
    return CliResult(code=code, out=out.getvalue(), err=err.getvalue())


def refused(*arguments: str | Path, words: Iterable[str], code: int = 2) -> str:
    """Call the command line, assert that it refuses with all these words; return the message."""
    result = call_cli(*arguments)
    assert result.code == code, result
    assert result.err.startswith("error: "), result.err
    missing = [word for word in words if word not in result.err]
    assert not missing, f"{missing} not in: {result.err}"
    return result.err


def slowed(method: str, delay_s: float = 0.1) -> Callable[[Parts], Parts]:
    """An ``adapt`` for `run`: the learner waits before ``method``; other tasks continue."""

    def adapt(parts: Parts) -> Parts:
        learner: Any = parts.learner
        at_once = getattr(learner, method)

        async def slow(*arguments: Any) -> Any:
            await asyncio.sleep(delay_s)
            return await at_once(*arguments)

        setattr(learner, method, slow)
        return parts

    return adapt
