"""Runs a command that must not outlive whoever asked for it. Standard library only.

    python -I -S guard.py PARENT_PID COMMAND...

Engines start processes of their own, and some survive the death of the one that started them. The
guard is the parent of them all: orphans are handed to it (child subreaper). It ends every one of
them when the command ends, when it is told to (SIGTERM), and when its own parent dies, even by
SIGKILL (parent-death signal). Without Linux's prctl only the process group is ended.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    signal.signal(signal.SIGTERM, _end_everything)
    if os.getppid() != parent:  # it died before the signal was arranged
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
    os._exit(128 + signum)


def _kill_descendants() -> None:
    """SIGKILL children until there are none: those of a dead child become ours."""
    while True:
        children = _children()
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    me, found = os.getpid(), list[int]()
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
            if int(fields[1]) == me:
                found.append(int(entry))
    return found


if __name__ == "__main__":
    main()
