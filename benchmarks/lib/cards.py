"""The used memory of every card of this machine, by nvidia-smi."""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_POLL_S = 1.0
_QUERY = ("--query-gpu=memory.used", "--format=csv,noheader,nounits")


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Poll the used memory of every card in use; the list has the largest of each, in GiB.

    It stays empty where there is no nvidia-smi.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    query = (*_QUERY, f"--id={visible}") if visible else _QUERY
    peaks: list[float] = []
    done = threading.Event()
    program = shutil.which("nvidia-smi")

    def poll() -> None:
        while program is not None and not done.wait(_POLL_S):
            found = subprocess.run([program, *query], capture_output=True, text=True, check=False)
            used = [int(line) / 1024 for line in found.stdout.split() if line.isdecimal()]
            for i, value in enumerate(used):
                if i == len(peaks):
                    peaks.append(0.0)
                peaks[i] = max(peaks[i], value)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def card_names() -> list[str]:
    """Names of this machine's cards; empty where there is no nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip().splitlines()
