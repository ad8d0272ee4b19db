"""Runs a Ray of one machine for one run; ended with the process that started it.

    python -m qwen3_distill.hosts.ray_head ADDRESS_FILE SETTINGS_AS_JSON

It runs under the guard, which ends all of Ray's processes and removes its session's files, also
when the run's process is killed. `ray start` would need a fixed port for its client server.
"""

import json
import signal
import sys
from pathlib import Path

import ray


def main() -> None:
    """Start Ray, write its address into the file, and wait to be ended."""
    file = Path(sys.argv[1])
    ray.init(address="local", **json.loads(sys.argv[2]))
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(ray.get_runtime_context().gcs_address)
    unfinished.replace(file)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
