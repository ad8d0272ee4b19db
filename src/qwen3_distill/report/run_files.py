"""Reads the files of a run folder that the report shows."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_distill.config.redaction import recordable
from qwen3_distill.errors import DataError
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.report.drawing import Point
from qwen3_distill.report.timeline import Timeline, load_timeline


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

    @classmethod
    def load(cls, folder: Path) -> "RunFiles":
        config = _json_if_there(folder / "config.json")
        return cls(
            name=folder.resolve().name,
            config=None if config is None else recordable(config),
            manifest=_json_if_there(folder / "manifest.json"),
            prompt=_json_if_there(folder / "prompt.json"),
            summary=_json_if_there(folder / "summary.json"),
            steps=_jsonl_if_there(folder / "metrics.jsonl"),
            evaluations=_jsonl_if_there(folder / "evaluations.jsonl"),
            timeline=load_timeline(folder),
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
        return self._student_by_step(at_second=False)

    def _student_by_step(self, *, at_second: bool) -> list[Mapping[str, Any]]:
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
        student = self._student_by_step(at_second=at_second)
        if who == "before":
            return student[0] if student and student[0]["step"] == 0 else None
        return student[-1] if student and student[-1]["step"] > 0 else None

    @property
    def last_step(self) -> int | None:
        return self.steps[-1]["step"] if self.steps else None


def _json_if_there(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object")
    return content


def _jsonl_if_there(path: Path) -> list[dict[str, Any]]:
    try:
        return read_jsonl(path)
    except FileNotFoundError:
        return []


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
