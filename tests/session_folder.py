"""Gives a test session a folder for temporary files, in memory where there is room for them.

The tests write many small files and sync them. A session that passed leaves nothing behind; where
a test failed, its files are kept until the next session begins.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

VARIABLE = "QWEN3_DISTILL_TESTS_FOLDER"
"""Set for the processes that a session starts: they use its folder."""
MEMORY = Path("/dev/shm")
ROOM_BYTES = 6 << 30
"""A session keeps far less; engines put their shared memory there too."""
_PREFIX = "q3dt-"  # short: sockets lie in the folder, and their paths are limited
_kept: list[Path] = []


def use_session_folder() -> Path:
    """Make the session's folder that of temporary files, here and in the processes started here.

    The process that begins the session makes it, and removes it at its exit.
    """
    if VARIABLE not in os.environ:
        folder = make_folder(roomy_parent())
        os.environ |= {VARIABLE: str(folder), "TMPDIR": str(folder)}
        atexit.register(_remove, folder)  # registered before all others, so called after them
    tempfile.tempdir = os.environ[VARIABLE]
    return Path(os.environ[VARIABLE])


def keep(folder: Path) -> None:
    """Let a session's folder outlive it."""
    _kept.append(folder)


def roomy_parent() -> Path:
    """Return the folder of memory if it has room, else that of temporary files."""
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM_BYTES:
        return MEMORY
    return Path(tempfile.gettempdir())


def make_folder(parent: Path) -> Path:
    """Make this process's folder, once those of sessions that are over are removed."""
    for folder in parent.glob(f"{_PREFIX}*"):
        if not _is_alive(folder.name.removeprefix(_PREFIX)):
            shutil.rmtree(folder, ignore_errors=True)  # another user's stays
    made = parent / f"{_PREFIX}{os.getpid()}"
    made.mkdir(mode=0o700)
    return made


def _is_alive(pid: str) -> bool:
    if pid == str(os.getpid()):
        return False  # of an earlier process that had this number
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(folder: Path) -> None:
    if folder not in _kept:
        shutil.rmtree(folder, ignore_errors=True)


FOLDER = use_session_folder()
