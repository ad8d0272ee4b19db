"""Writes checkpoints whole or not at all, and reads the newest intact one.

A checkpoint is a directory ``step-000025`` with the learner's files, ``cursor.json`` and
``files.json`` (SHA-256 of every other file). It is written under another name, flushed to disk
and renamed.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen3_distill.errors import CheckpointError
from qwen3_distill.pipeline.identity import RunIdentity
from qwen3_distill.pipeline.run_folder import full_disk_named
from qwen3_distill.ports import FollowingTeacher, Learner
from qwen3_distill.recording.records import is_count
from qwen3_distill.types import RunCursor, WeightVersion
from qwen3_distill.utils.files import file_sha256, sync
from qwen3_distill.utils.json_text import read_json_object
from qwen3_distill.utils.shown import shown

_DIGESTS = "files.json"
_CURSOR = "cursor.json"
_NAME = re.compile(r"step-([0-9]{6,18})")


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        identity: of the run; every cursor carries it, and a checkpoint of another run is refused.
    """

    def __init__(self, directory: Path, *, keep_last: int, identity: RunIdentity) -> None:
        self._directory = directory
        self._keep_last = keep_last
        self._identity = identity

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        names = (_NAME.fullmatch(path.name) for path in self._directory.glob("step-*"))
        return sorted(int(name[1]) for name in names if name)

    async def save(
        self, learner: Learner, cursor: RunCursor, teacher: FollowingTeacher | None = None
    ) -> None:
        """Write a checkpoint and remove the oldest ones beyond ``keep_last``.

        Args:
            teacher: one that follows the student, whose state belongs to the run's.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        for leftover in self._directory.glob(".unfinished-*"):  # of a crash
            shutil.rmtree(leftover)
        temporary = self._directory / f".unfinished-{cursor.step:06d}"
        try:
            await _write(temporary, learner, teacher, asdict(cursor) | asdict(self._identity))
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

    async def restore(
        self,
        learner: Learner,
        warn: Callable[[str], None],
        teacher: FollowingTeacher | None = None,
    ) -> RunCursor | None:
        """Load the newest intact checkpoint into the learner; None if there is no checkpoint.

        Args:
            warn: told which checkpoints were skipped, and why.
            teacher: one that follows the student; without a checkpoint it is reset.

        Raises:
            CheckpointError: there are checkpoints, but none can be read; or one is of another run.
        """
        steps = self.steps()
        for step in steps:
            self._require_own(step)
        for step in reversed(steps):
            try:
                cursor = self._read_cursor(step)
                await learner.load_state(self._path(step), cursor.weight_version)
                if teacher is not None:
                    await teacher.load_state(self._path(step), cursor.weight_version)
            except CheckpointError as error:
                warn(f"checkpoint of step {step} is corrupt and passed over: {error}")
                continue
            return cursor
        if steps:
            raise CheckpointError(
                f"none of the checkpoints in {self._directory} can be read; restore them from a "
                "copy, or remove the run folder to start again"
            )
        if teacher is not None:
            await teacher.reset()
        return None

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step:06d}"

    def _read_cursor(self, step: int) -> RunCursor:
        """Compare every file of a checkpoint with its digest, then return its cursor."""
        directory = self._path(step)
        try:
            digests = read_json_object(directory / _DIGESTS)
            unlisted = {path.name for path in directory.iterdir()} - {_DIGESTS, *digests}
            if unlisted:
                raise CheckpointError(f"{directory / _DIGESTS} does not list {sorted(unlisted)}")
            for name, digest in digests.items():
                if name != Path(name).name or not name:
                    raise CheckpointError(f"{directory / _DIGESTS} lists {shown(name)}")
                if file_sha256(directory / name) != digest:
                    raise CheckpointError(f"{directory / name} does not match its digest")
            return _cursor_of(read_json_object(directory / _CURSOR), step)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory}: {error}") from error

    def _require_own(self, step: int) -> None:
        """Refuse a checkpoint of another run; one whose cursor was damaged is only corrupt."""
        directory = self._path(step)
        try:
            raw = read_json_object(directory / _CURSOR)
            digest = read_json_object(directory / _DIGESTS).get(_CURSOR)
            if digest != file_sha256(directory / _CURSOR):
                return
        except (OSError, ValueError):
            return
        difference = self._identity.difference(raw.get("run_id"), raw.get("config_digest"))
        if difference is not None:
            raise CheckpointError(
                f"{directory} is a checkpoint of another run ({difference}); move it out of "
                f"{self._directory}, or restore this run's own there"
            )


def _cursor_of(raw: dict[str, Any], step: int) -> RunCursor:
    """Return the cursor that a checkpoint's file holds.

    Raises:
        ValueError: a field is missing or has another type, or the cursor is of another step.
    """
    version, outstanding = raw.get("weight_version"), raw.get("outstanding")
    if not isinstance(version, dict) or not isinstance(outstanding, list):
        raise ValueError(f"{_CURSOR} holds no cursor")
    counts = [raw.get("step"), raw.get("prompts_drawn"), version.get("step"), *outstanding]
    if not all(is_count(count) and count < 2**63 for count in counts):
        raise ValueError(f"{_CURSOR} has a count that is none: {shown(counts)}")
    if raw["step"] != step or version["step"] != step or not isinstance(version.get("digest"), str):
        raise ValueError(f"{_CURSOR} is not of step {step}")
    return RunCursor(
        step=step,
        prompts_drawn=raw["prompts_drawn"],
        weight_version=WeightVersion(step=version["step"], digest=version["digest"]),
        outstanding=tuple(outstanding),
    )


async def _write(
    directory: Path, learner: Learner, teacher: FollowingTeacher | None, cursor: dict[str, Any]
) -> None:
    """Write all files of a checkpoint and flush them to disk."""
    directory.mkdir()
    with full_disk_named(directory):
        await learner.save_state(directory)
        if teacher is not None:
            await teacher.save_state(directory)
    _write_json(directory / _CURSOR, cursor)
    digests = {path.name: file_sha256(path) for path in sorted(directory.iterdir())}
    _write_json(directory / _DIGESTS, digests)
    for path in (*directory.iterdir(), directory):
        sync(path)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
