"""Reads the files of a run folder that the report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_distill.config.redaction import recordable
from qwen3_distill.errors import DataError
from qwen3_distill.recording.cost_records import CostTotals, read_cost
from qwen3_distill.recording.records import (
    is_number,
    read_evaluations,
    read_steps,
    read_summary,
)
from qwen3_distill.report.drawing import Point
from qwen3_distill.report.timeline import Timeline, load_timeline
from qwen3_distill.utils.json_text import read_json_object


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Contents of a run folder; empty or None where a file is missing."""

    name: str
    config: Mapping[str, Any] | None
    manifest: Mapping[str, Any] | None
    prompt: Mapping[str, Any] | None
    summary: Mapping[str, Any] | None
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    timeline: Timeline | None
    cost: CostTotals | None
    notes: Sequence[str]
    """A line for each thing that is left out of the page, with the cause."""

    @classmethod
    def load(cls, folder: Path, *, with_timeline: bool = True) -> "RunFiles":
        """Read a folder's files.

        Raises:
            DataError: a record has another form. An old trace is left out, and `notes` says so.
        """
        notes: list[str] = []
        config = _json_if_there(folder / "config.json")
        return cls(
            name=folder.resolve().name,
            config=None if config is None else recordable(config),
            manifest=_json_if_there(folder / "manifest.json"),
            prompt=_json_if_there(folder / "prompt.json"),
            summary=_summary_if_there(folder / "summary.json"),
            steps=read_steps(folder / "metrics.jsonl", complete=False),
            evaluations=read_evaluations(folder / "evaluations.jsonl", complete=False),
            timeline=load_timeline(folder, note=notes.append) if with_timeline else None,
            cost=read_cost(folder, with_points=True),
            notes=notes,
        )

    def points(self, key: str) -> list[Point]:
        """(step, value) of every step that has a finite value for ``key``."""
        return [(line["step"], line[key]) for line in self.steps if is_number(line.get(key))]

    def values(self, key: str) -> list[float]:
        return [y for _, y in self.points(key)]

    def setting(self, *path: str) -> Any:
        """A value of the config; None where the config does not have it."""
        value: Any = self.config
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    @property
    def student_evaluations(self) -> list[Mapping[str, Any]]:
        """The student's evaluations by step: one per step, that of the most problems."""
        return self.student_by_step(at_second=False)

    def student_by_step(self, *, at_second: bool) -> list[Mapping[str, Any]]:
        """`student_evaluations`, or those at the second temperature."""
        by_step: dict[int, Mapping[str, Any]] = {}
        for record in self.evaluations:
            is_student = record["model"].startswith("student")
            if is_student and ("temperature" in record) == at_second:
                earlier = by_step.get(record["step"])
                if earlier is None or record["num_problems"] >= earlier["num_problems"]:
                    by_step[record["step"]] = record
        return [by_step[step] for step in sorted(by_step)]

    def evaluation(self, who: str, *, at_second: bool = False) -> Mapping[str, Any] | None:
        """The record in ``evaluations.jsonl`` of the ``teacher``, or of the student ``before`` or
        ``after`` training; None without one.

        Args:
            at_second: the one at the second temperature.
        """
        if who == "teacher":
            teacher = (e for e in self.evaluations if e["model"].startswith("teacher"))
            return next((e for e in teacher if ("temperature" in e) == at_second), None)
        student = self.student_by_step(at_second=at_second)
        if who == "before":
            return student[0] if student and student[0]["step"] == 0 else None
        return student[-1] if student and student[-1]["step"] > 0 else None

    @property
    def last_step(self) -> int | None:
        return self.steps[-1]["step"] if self.steps else None


def _json_if_there(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is no record of a run: {error}") from error


def _summary_if_there(path: Path) -> dict[str, Any] | None:
    return read_summary(path) if path.exists() else None
