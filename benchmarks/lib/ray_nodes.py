"""A Ray cluster of three nodes on this machine, for measurements and tests without GPUs."""

import os
import time
from pathlib import Path
from typing import Any

from typing_extensions import Self

CARD = "slot"
"""The resource that stands for a card."""
_HEAD_CARDS, _CARDS = 1, 5
"""One of the two others can hold all engines but the first rank: a killed node's find a place."""
_NUM_NODES = 3
_STORE_BYTES = 80 << 20


class RayNodes:
    """The nodes. The driver is on the first, which has a card for the learner only: a driver dies
    with the raylet of its node, and only its own death is to be struck by name."""

    def __init__(self) -> None:
        self._cluster: Any = None

    def __enter__(self) -> Self:
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        from ray.cluster_utils import Cluster  # noqa: PLC0415 - an extra

        Path("/tmp/ray").mkdir(exist_ok=True)  # where `Cluster` writes its address
        self._cluster = Cluster()
        self._add(_HEAD_CARDS)
        for _ in range(_NUM_NODES - 1):
            self._add(_CARDS)
        return self

    def __exit__(self, *error: object) -> None:
        self._cluster.shutdown()

    @property
    def address(self) -> str:
        return self._cluster.address

    def replace_dead(self) -> None:
        """Start a node for each whose raylet was killed."""
        for node in self._cluster.list_all_nodes():
            if not node.any_processes_alive() or _raylet_is_dead(node):
                self._cluster.remove_node(node, allow_graceful=False)
                self._add(_CARDS)
                time.sleep(1.0)

    def _add(self, cards: int) -> None:
        self._cluster.add_node(
            num_cpus=2,
            num_gpus=0,
            resources={CARD: cards},
            object_store_memory=_STORE_BYTES,
            include_dashboard=False,
        )


def _raylet_is_dead(node: Any) -> bool:
    (raylet,) = node.all_processes["raylet"]
    return raylet.process.poll() is not None


def raylet_pids() -> dict[str, int]:
    """Processes of the raylets of this machine, by node id."""
    found: dict[str, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if words[0].endswith("/raylet"):
            for word in words:
                if word.startswith("--node_id="):
                    found[word.partition("=")[2]] = int(folder.name)
    return found
