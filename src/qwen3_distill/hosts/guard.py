"""Runs a command that must not outlive its caller. Standard library only.

    python -I -S guard.py PARENT_PID --scratch=FOLDER [--remove=FOLDER]... COMMAND...

Engines start processes of their own, and some survive the death of the one that started them. The
guard is the parent of them all: orphans are handed to it (child subreaper). It ends every one of
them when the command ends, on SIGTERM, and when its own parent dies, even by SIGKILL (parent-death
signal). Without Linux's prctl only the process group is ended. It also deletes their shared-memory
files, which a process killed by SIGKILL leaves behind, the folder of its temporary files, and when
its own parent has died, further folders that it was given.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PARENT, _GROUP = 1, 2
_MEMORY = "/dev/shm/"
_SHARED = ("psm_", "sem.mp-", "sglang_")
"""Name prefixes: Python's shared memory, its semaphores, SGLang's shared memory."""


_SCRATCH = "--scratch="
_REMOVE = "--remove="
_scratch = ""
"""Folder of the command's temporary files."""
_folders: list[str] = []
"""Folders of the parent, removed when it is gone: it can no longer do so."""
_parent = 0


def main() -> None:
    global _parent, _scratch
    _parent, command = int(sys.argv[1]), sys.argv[2:]
    _scratch = command.pop(0)[len(_SCRATCH) :]
    while command and command[0].startswith(_REMOVE):
        _folders.append(command.pop(0)[len(_REMOVE) :])
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    signal.signal(signal.SIGTERM, _end_everything)
    if os.getppid() != _parent:  # it died before the signal was arranged
        _remove(_scratch, *_folders)
        sys.exit(1)
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201
        sys.exit(127)
    while True:
        pid, status = os.wait()  # orphans are reaped here too
        if pid == child.pid:
            break
    _kill_descendants()
    code = os.waitstatus_to_exitcode(status)
    sys.exit(code if code >= 0 else 128 - code)


def _end_everything(signum: int, frame: FrameType | None) -> None:
    _kill_descendants()
    if _parent_is_dead():
        _remove(*_folders)
    os._exit(128 + signum)


def _parent_is_dead() -> bool:
    """Whether the parent has died, or its first thread has, while others of it are still dying."""
    if os.getppid() != _parent:
        return True
    try:
        with open(f"/proc/{_parent}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except OSError:
        return True


def _remove(*folders: str) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _kill_descendants() -> None:
    """SIGKILL children until there are none: those of a dead child become ours.

    Removes what they leave behind.
    """
    shared = set[str]()
    while True:
        children = _processes(_PARENT, os.getpid())
        if not children:
            break
        shared |= shared_memory_of(children)
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
    remove(shared)
    _remove(_scratch)


def kill_group(group: int) -> None:
    """SIGKILL a process group at once."""
    shared = shared_memory_of(_processes(_GROUP, group))
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    remove(shared)


def shared_memory_of(pids: Iterable[int]) -> set[str]:
    """Files of shared memory, of the kinds that engines make, that processes have mapped.

    By their inodes: a semaphore is mapped under another name, which is gone.
    """
    inodes = set[int]()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as file:
            fields = (line.split(None, 5) for line in file)
            inodes.update(int(f[4]) for f in fields if len(f) == 6 and f[5].startswith(_MEMORY))
    with contextlib.suppress(OSError), os.scandir(_MEMORY) as entries:
        ours = [entry for entry in entries if entry.name.startswith(_SHARED)]
        return {entry.path for entry in ours if entry.inode() in inodes}
    return set()


def remove(files: Iterable[str]) -> None:
    """Unlink files; some may be gone."""
    for file in files:
        with contextlib.suppress(OSError):
            os.unlink(file)


def _processes(field: int, value: int) -> list[int]:
    """Processes whose ``/proc/PID/stat`` has a value in a field after the name."""
    found = list[int]()
    try:
        entries = os.listdir("/proc")
    except OSError:
        return found
    for entry in entries:
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    # The name may hold spaces; the fields after its bracket do not.
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[field]) == value:
                found.append(int(entry))
    return found


if __name__ == "__main__":
    main()
