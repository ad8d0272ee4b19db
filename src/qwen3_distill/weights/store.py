"""Weight versions in Ray's object store: any node fetches one, and holds one copy of it.

The learner publishes into files of its own machine, as without a cluster. The run's process puts a
version's files into the store when the first replica asks for it; replicas fetch it then, at any
time, and a dead one holds nobody up. A version never changes: it is named by the digest of its
weights, and each file by the digest of its bytes, which the receiver compares.
"""

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_distill.errors import WeightVersionError
from qwen3_distill.hosts.ray_host import RayHost
from qwen3_distill.ports import Reach, WeightChannel, WeightPayload, reaches
from qwen3_distill.types import WeightVersion
from qwen3_distill.weights.adapter_files import version_name
from qwen3_distill.weights.directory import DirectoryChannel

_KEPT = 2
"""Versions that the store holds: the newest, and the one that a replica may still be fetching."""


@dataclass(frozen=True)
class _Stored:
    references: Mapping[str, Any]
    """The files' contents in the object store, by name."""
    digests: Mapping[str, str]


class StoreChannel:
    """A `WeightChannel` that reaches every node of a cluster.

    A pickled copy publishes into the same files; only the run's own object offers them to the
    cluster.

    Args:
        root: folder on the learner's machine, which is the run's.
    """

    reach: Reach = "cluster"

    def __init__(self, root: Path) -> None:
        self._files = DirectoryChannel(root)
        self._root = root
        self._stored: dict[WeightVersion, _Stored] = {}
        self._lock = asyncio.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreChannel, (self._root,)

    def publish(self, version: WeightVersion, payload: WeightPayload) -> None:
        self._files.publish(version, payload)

    def fetch(self, version: WeightVersion) -> WeightPayload:
        return self._files.fetch(version)

    def adapter_directory(self, version: WeightVersion, folder: Path) -> Path:
        return self._files.adapter_directory(version, folder)

    def switched_transport(self, version: WeightVersion) -> bool:
        return False

    async def deliver(self, version: WeightVersion, host: RayHost) -> DirectoryChannel:
        """Bring a version to the node of a host; return a channel that its worker can use.

        Raises:
            WeightVersionError: the version was not published, or is not kept any more.
            EngineLost: the node cannot fetch it.
        """
        async with self._lock:  # the first replica that asks has it put into the store
            stored = self._stored.get(version)
            if stored is None:
                stored = await asyncio.to_thread(self._put, version)
                self._stored[version] = stored
                # In the order of publishing: a learner that was lost publishes earlier steps again.
                for old in list(self._stored)[:-_KEPT]:
                    del self._stored[old]  # Ray frees what nobody refers to
        folder = await host.receive(stored.references, stored.digests)
        return DirectoryChannel(folder)

    def _put(self, version: WeightVersion) -> _Stored:
        import ray

        directory = self._root / version_name(version)
        references: dict[str, Any] = {}
        digests: dict[str, str] = {}
        try:
            for path in sorted(directory.iterdir()):
                content = np.fromfile(path, dtype=np.uint8)  # Ray maps arrays without a copy
                name = f"{directory.name}/{path.name}"
                digests[name] = hashlib.blake2b(content.data).hexdigest()
                references[name] = ray.put(content)
        except OSError as error:
            raise WeightVersionError(
                f"the channel {self._root} does not hold {version}; publish it first ({error})"
            ) from error
        return _Stored(references, digests)


class SharedFolderChannel(DirectoryChannel):
    """Versions in a folder that every node of the cluster mounts under the same path."""

    reach: Reach = "cluster"


async def deliver(version: WeightVersion, channel: WeightChannel, host: RayHost) -> WeightChannel:
    """Bring a version to where a host runs; return a channel that its worker can use.

    Raises:
        WeightVersionError: the channel does not hold the version, or does not reach other nodes.
    """
    if isinstance(channel, StoreChannel):
        return await channel.deliver(version, host)
    if not reaches(channel, "cluster"):
        raise WeightVersionError(
            f"{host.name} runs in a cluster, and weights travel by a channel that reaches no "
            f"further than this {channel.reach}"
        )
    return channel
