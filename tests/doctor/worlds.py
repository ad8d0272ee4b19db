"""Builds a config of copies of the lab pair, which a test spoils in one place."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3_distill.config.load import check_config
from qwen3_distill.data.chain_task import ChainTask
from qwen3_distill.doctor.diagnosis import Diagnosis, diagnose
from qwen3_distill.pipeline.finding import Finding, Status
from qwen3_distill.pipeline.parts import Parts
from tests.pipeline.builders import SAMPLED, Values

LAB = Path(__file__).parents[2] / "models" / "lab"
NUM_ROLLOUTS = 4
Adapt = Callable[[Parts], Parts]


@dataclass
class World:
    """Files and settings of a run on which every check passes, until it is spoiled."""

    folder: Path
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings by dotted key."""
    adapt: Adapt = lambda parts: parts

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def rows(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def values(self) -> Values:
        values: Values = {
            "output_dir": str(self.folder / "run"),
            "steps": 4,
            "prompts_per_step": 4,
            "student": {"model": str(self.student)},
            "prompts": {"kind": "jsonl", "path": str(self.rows), "answer_field": "answer"},
            "sampling": {"max_new_tokens": 80},
            "generation": {"kind": "embedded", "device": "cpu"},
            "scoring": {"kind": "embedded", "model": str(self.teacher), "device": "cpu"},
            "training": {
                "kind": "embedded",
                "device": "cpu",
                "tuning": {"kind": "full"},
                "optimizer": {"learning_rate": 1e-3},
            },
            "objective": dict(SAMPLED),
            "verifier": {"kind": "math"},
            "logging": {"tensorboard": False},
        }
        for key, value in self.changes.items():
            *parents, last = key.split(".")
            section = values
            for parent in parents:
                section = section[parent]
            section[last] = value
        return values

    def edit_json(self, file: Path, **values: Any) -> None:
        """Set keys of a JSON file."""
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    def write_rows(self, rows: Sequence[dict[str, str]]) -> None:
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def diagnose(self, *, engines: bool = True) -> Diagnosis:
        return diagnose(
            check_config(self.values),
            engines=engines,
            num_rollouts=NUM_ROLLOUTS,
            unquantized=None,
            say=lambda text: None,
            tell=lambda finding: None,
            adapt=self.adapt,
        )


def good_rows(count: int = 12) -> list[dict[str, str]]:
    """Problems of the task that the lab pair was trained on."""
    problems = [ChainTask().problem("train", index) for index in range(count)]
    return [{"prompt": problem.text, "answer": problem.answer} for problem in problems]


def make_world(folder: Path) -> World:
    """Copy the lab pair and write a few problems."""
    world = World(folder)
    shutil.copytree(LAB / "student", world.student)
    shutil.copytree(LAB / "teacher", world.teacher)
    world.write_rows(good_rows())
    return world


def by_name(diagnosis: Diagnosis) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnosis.findings}


def with_status(diagnosis: Diagnosis, *statuses: Status) -> list[str]:
    """Names of the checks that ended so."""
    return [finding.name for finding in diagnosis.findings if finding.status in statuses]
