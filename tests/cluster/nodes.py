"""A Ray cluster of three nodes on this machine, started when it is first asked for."""

import atexit
import os
import signal
from pathlib import Path
from typing import Any

CARD = "slot"
"""The resource that stands for a card."""
NODES: tuple[dict[str, float], ...] = (
    {CARD: 2},
    {CARD: 2, "spark": 1},
    {CARD: 2, "spark": 1},
)
_STORE_BYTES = 80 << 20


class ThreeNodes:
    """The cluster; the first node is the one of the tests' own process."""

    def __init__(self) -> None:
        self._cluster: Any = None

    @property
    def address(self) -> str:
        return self.cluster.address

    @property
    def cluster(self) -> Any:
        if self._cluster is None:
            os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
            from ray.cluster_utils import Cluster

            atexit.register(self.close)
            Path("/tmp/ray").mkdir(exist_ok=True)  # where `Cluster` writes its address
            self._cluster = Cluster()
            for i in range(len(NODES)):
                self.add(i)
        return self._cluster

    def add(self, index: int) -> Any:
        """Start a node, also one that replaces a killed one."""
        return self._cluster.add_node(
            num_cpus=2,
            num_gpus=0,
            resources=NODES[index],
            object_store_memory=_STORE_BYTES,
            include_dashboard=False,
        )

    def kill_raylet(self, node: Any) -> None:
        """Kill a node's raylet with SIGKILL."""
        (raylet,) = node.all_processes["raylet"]
        os.kill(raylet.process.pid, signal.SIGKILL)

    def close(self) -> None:
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.shutdown()


THREE_NODES = ThreeNodes()
