"""JSON Lines files of a run, which survive a crash and a resume."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from qwen3_distill.errors import DataError, RunFolderError
from qwen3_distill.types import Metric
from qwen3_distill.utils.files import atomic_path
from qwen3_distill.utils.json_text import parse_json

STEP_STAGES = ("generate", "score", "train", "publish")
"""Stages that every step has; their seconds are ``time/{stage}_s``."""
OCCASIONAL_STAGES = ("evaluate", "checkpoint")
"""Stages that only some steps have."""

LogValue: TypeAlias = float | int | str | None


def combine(metrics: Iterable[Metric]) -> dict[str, float]:
    """Merge the metrics of one step by key, each by its own reduction.

    Returns:
        One value per key, in order of first appearance. NaN where a mean has a count of 0.

    Raises:
        ValueError: one key comes with two reductions.
    """
    merged: dict[str, Metric] = {}
    for metric in metrics:
        earlier = merged.get(metric.key)
        merged[metric.key] = metric if earlier is None else earlier.combined(metric)
    return {key: metric.value for key, metric in merged.items()}


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Return all records of a JSON Lines file.

    A last line that a crash cut short is left out.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a line other than a torn last one is not a JSON object.
    """
    path = Path(path)
    *lines, tail = path.read_bytes().split(b"\n")
    records = [_parse(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    # Without its newline a line counts only if it is whole: an object that parses is.
    if tail.strip() and (record := _parse_or_none(tail)) is not None:
        records.append(record)
    return records


class JsonlLog:
    """Append-only JSON Lines file; every record has a ``step``.

    Used for ``metrics.jsonl`` (one line per step) and ``evaluations.jsonl`` (one line per step and
    model). A line is on disk when `log` returns, so a crash loses at most the line being written.
    """

    def __init__(self, path: Path | str) -> None:
        """Open ``path`` for appending; create it if it is missing; cut off a torn last line.

        Raises:
            RunFolderError: the file cannot be written.
            DataError: the file holds something other than records with a step.
        """
        self._path = Path(path)
        self._last_step: int | None = None
        self._fd: int | None = None
        try:
            if self._path.exists():
                self._keep(self._records(), rewrite=self._ends_torn())
            self._open()
        except OSError as error:
            raise self._unusable(error) from error

    def log(self, step: int, values: Mapping[str, LogValue]) -> None:
        """Write one line and wait until it is on disk.

        NaN and infinity become ``null``: JSON has neither, and a mean with nothing to average must
        not end a run. The learner refuses a loss or gradient that is not finite.

        Args:
            step: Optimizer steps done; must not decrease from line to line.
            values: JSON scalars by key. Must not contain ``step``.

        Raises:
            RunFolderError: the line cannot be written, or ``step`` is less than the last line's.
            ValueError: ``values`` contains ``step``.
        """
        if "step" in values:
            raise ValueError("values must not contain `step`: it is an argument of its own")
        if self._last_step is not None and step < self._last_step:
            raise RunFolderError(
                f"{self._path}: step {step} after step {self._last_step}; a run that resumes calls "
                "truncate_after first"
            )
        record = {"step": step, **{key: _json_value(value) for key, value in values.items()}}
        self.append(record)
        self._last_step = step

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record of any step and wait until it is on disk.

        Raises:
            RunFolderError: the line cannot be written.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            self._write(line)
        except OSError as error:
            raise self._unusable(error) from error

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps; a run resumed at ``step`` writes them again.

        The file is replaced atomically: a crash leaves either the old or the new one.

        Raises:
            RunFolderError: the file cannot be replaced.
            DataError: a line is not a record with a step.
        """
        try:
            records = self._records()
            kept = [record for record in records if record["step"] <= step]
            self.close()
            self._keep(kept, rewrite=len(kept) < len(records))
            self._open()
        except OSError as error:
            raise self._unusable(error) from error

    def close(self) -> None:
        """Close the file. May be called more than once."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _ends_torn(self) -> bool:
        content = self._path.read_bytes()
        return bool(content) and not content.endswith(b"\n")

    def _records(self) -> list[dict[str, Any]]:
        records = read_jsonl(self._path)
        for number, record in enumerate(records, 1):
            if type(record.get("step")) is not int:
                raise DataError(f"{self._path}: record {number} has no integer `step`")
        return records

    def _keep(self, records: list[dict[str, Any]], *, rewrite: bool) -> None:
        if rewrite:
            with atomic_path(self._path) as temporary:
                lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                temporary.write_text("".join(lines), encoding="utf-8")
        self._last_step = records[-1]["step"] if records else None

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _write(self, line: bytes) -> None:
        if self._fd is None:
            raise RunFolderError(f"{self._path}: the log is closed")
        size = os.fstat(self._fd).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._fd, line[written:])
            os.fsync(self._fd)
        except OSError:
            # A full disk may have taken half a line, which the next one would be glued to.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)
            raise

    def _unusable(self, error: OSError) -> RunFolderError:
        if isinstance(error, RunFolderError):
            return error
        return RunFolderError(
            f"{self._path} cannot be written: {error.strerror or error}; free space or choose "
            "another output_dir. What was saved is kept: the same command goes on from there"
        )


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    record = _parse_or_none(line)
    if record is None:
        raise DataError(f"{path}:{number}: not a JSON object: {line[:80]!r}")
    return record


def _parse_or_none(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:  # malformed JSON, or bytes that are not UTF-8
        return None
    return record if isinstance(record, dict) else None


def _json_value(value: LogValue) -> LogValue:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
