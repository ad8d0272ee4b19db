"""Lists the processes that this one has started, to see whether any outlives its engine."""

import asyncio
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_NOT_AN_ENGINE = (
    b"resource_tracker",
    b"multiprocessing.forkserver",
    b"verifiers/math_process.py",
    b"verifiers/function_process.py",
)
"""Helpers that Python or a verifier keeps until this process ends."""


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one with its id by the moment of its start."""

    pid: int
    started: int


def descendants() -> set[Process]:
    """Return the running processes below this one; none where there is no ``/proc``."""
    parent_of: dict[Process, int] = {}
    for folder in _PROC.glob("[0-9]*"):
        try:
            # The name, in parentheses, may hold anything; the fields follow it.
            fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except (OSError, UnicodeDecodeError):
            continue
        state, parent, started = fields[0], int(fields[1]), int(fields[19])
        if state != "Z":
            parent_of[Process(int(folder.name), started)] = parent
    found: set[Process] = set()
    below = {os.getpid()}
    while below:
        children = {process for process, parent in parent_of.items() if parent in below}
        below = {process.pid for process in children - found}
        found |= children
    return {process for process in found if not _is_helper(process)}


def _is_helper(process: Process) -> bool:
    try:
        command = (_PROC / str(process.pid) / "cmdline").read_bytes()
    except OSError:
        return False
    return any(name in command for name in _NOT_AN_ENGINE)


def alive(processes: Iterable[Process]) -> set[Process]:
    """Return those that still run, wherever they belong now: an orphan has another parent."""
    found: set[Process] = set()
    for process in processes:
        try:
            text = (_PROC / str(process.pid) / "stat").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        fields = text.rpartition(")")[2].split()
        if fields[0] != "Z" and int(fields[19]) == process.started:
            found.add(process)
    return found


async def left_after(processes: Iterable[Process], patience_s: float) -> set[Process]:
    """Wait until all have ended, for so long at most; return those that have not."""
    ends = time.monotonic() + patience_s
    while (left := alive(processes)) and time.monotonic() < ends:
        await asyncio.sleep(0.1)
    return left
