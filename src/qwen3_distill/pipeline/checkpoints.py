"""Writes checkpoints whole or not at all, and reads the newest intact one.

A checkpoint is a directory ``step-000025`` with the learner's files, ``cursor.json`` and
``files.json`` (SHA-256 of every other file). It is written under another name, flushed to disk
and renamed.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from qwen3_distill.errors import CheckpointError
from qwen3_distill.pipeline.run_folder import full_disk_named
from qwen3_distill.ports import Learner
from qwen3_distill.types import RunCursor, WeightVersion
from qwen3_distill.utils.files import file_sha256, sync

_DIGESTS = "files.json"
_CURSOR = "cursor.json"


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, *, keep_last: int) -> None:
        self._directory = directory
        self._keep_last = keep_last

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        names = [path.name.removeprefix("step-") for path in self._directory.glob("step-*")]
        return sorted(int(name) for name in names if name.isdecimal())

    async def save(self, learner: Learner, cursor: RunCursor) -> None:
        """Write a checkpoint and remove the oldest ones beyond ``keep_last``."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for leftover in self._directory.glob(".unfinished-*"):  # of a crash
            shutil.rmtree(leftover)
        temporary = self._directory / f".unfinished-{cursor.step:06d}"
        try:
            await _write(temporary, learner, cursor)
        except Exception:  # half a checkpoint is useless, and the disk may be full
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        final = self._path(cursor.step)
        shutil.rmtree(final, ignore_errors=True)  # a corrupt one that was skipped
        temporary.rename(final)
        sync(self._directory)
        # Later ones were corrupt and skipped. Counted, they would push out intact ones.
        up_to_here = [step for step in self.steps() if step <= cursor.step]
        for step in up_to_here[: -self._keep_last]:
            shutil.rmtree(self._path(step))

    async def restore(self, learner: Learner, warn: Callable[[str], None]) -> RunCursor | None:
        """Load the newest intact checkpoint into the learner; None if there is no checkpoint.

        Args:
            warn: told which checkpoints were skipped, and why.

        Raises:
            CheckpointError: there are checkpoints, but none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                cursor = self._read_cursor(step)
                await learner.load_state(self._path(step), cursor.weight_version)
            except CheckpointError as error:
                warn(f"checkpoint of step {step} is corrupt and passed over: {error}")
                continue
            return cursor
        if steps:
            raise CheckpointError(
                f"none of the checkpoints in {self._directory} can be read; restore them from a "
                "copy, or remove the run folder to start again"
            )
        return None

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step:06d}"

    def _read_cursor(self, step: int) -> RunCursor:
        """Compare every file of a checkpoint with its digest, then return its cursor."""
        directory = self._path(step)
        try:
            digests = json.loads((directory / _DIGESTS).read_text())
            unlisted = {path.name for path in directory.iterdir()} - {_DIGESTS, *digests}
            if unlisted:
                raise CheckpointError(f"{directory / _DIGESTS} does not list {sorted(unlisted)}")
            for name, digest in digests.items():
                if file_sha256(directory / name) != digest:
                    raise CheckpointError(f"{directory / name} does not match its digest")
            raw = json.loads((directory / _CURSOR).read_text())
            raw["weight_version"] = WeightVersion(**raw["weight_version"])
            raw["outstanding"] = tuple(raw["outstanding"])
            return RunCursor(**raw)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{directory}: {error}") from error


async def _write(directory: Path, learner: Learner, cursor: RunCursor) -> None:
    """Write all files of a checkpoint and flush them to disk."""
    directory.mkdir()
    with full_disk_named(directory):
        await learner.save_state(directory)
    _write_json(directory / _CURSOR, asdict(cursor))
    digests = {path.name: file_sha256(path) for path in sorted(directory.iterdir())}
    _write_json(directory / _DIGESTS, digests)
    for path in (*directory.iterdir(), directory):
        sync(path)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
