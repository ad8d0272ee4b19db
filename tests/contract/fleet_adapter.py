"""Fleets as adapters of the contract suites: several members behind one port."""

import atexit
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen3_distill.config import ClusterConfig, ClusterEngines
from qwen3_distill.generation.embedded.engine import EmbeddedRolloutEngine
from qwen3_distill.generation.fleet import Deliver, RolloutFleet, already_there
from qwen3_distill.hosts.cluster import Cluster
from qwen3_distill.hosts.host import Host, MakeHost, WorkerSpec
from qwen3_distill.hosts.places import PlaceSpec
from qwen3_distill.hosts.ray_host import RayHost
from qwen3_distill.ports import StreamingRolloutEngine, TeacherScorer, WeightChannel
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.fleet import TeacherFleet
from qwen3_distill.types import SampledRequest, ScoreRequest, WeightVersion
from qwen3_distill.weights.store import StoreChannel
from tests.cluster.nodes import CARD, THREE_NODES
from tests.contract.builders import run
from tests.engines import LOGS


def no_losses(message: str) -> None:
    raise AssertionError(f"a member was lost: {message}")


def rollout_fleet(
    engines: Sequence[StreamingRolloutEngine], deliver: Deliver = already_there
) -> RolloutFleet:
    fleet = RolloutFleet(engines, max_restarts=3, deliver=deliver, warn=no_losses)
    run(fleet.start())
    return fleet


def teacher_fleet(teachers: Sequence[TeacherScorer]) -> TeacherFleet:
    fleet = TeacherFleet(teachers, max_restarts=3, warn=no_losses)
    run(fleet.start())
    return fleet


# --- In a cluster -------------------------------------------------------------------------------


class _Connection:
    """One connection of this process to the cluster of three nodes."""

    def __init__(self) -> None:
        self._cluster: Cluster | None = None

    @property
    def cluster(self) -> Cluster:
        if self._cluster is None:
            config = ClusterConfig(
                address=THREE_NODES.address, rollouts=ClusterEngines(), card_resource=CARD
            )
            self._cluster = Cluster(config, log=LOGS / "ray.log")
            run(self._cluster.start())
            atexit.register(self._close)
        return self._cluster

    def _close(self) -> None:
        assert self._cluster is not None
        run(self._cluster.close())


CONNECTION = _Connection()


def ray_hosts(hosts: dict[int, RayHost], index: int) -> MakeHost:
    """Make a host in a place of its own, and keep it by its index."""
    cluster = CONNECTION.cluster

    def make(spec: WorkerSpec) -> Host:
        hosts[index] = RayHost(spec, cluster.place(PlaceSpec(name=f"{spec.name} {index}")))
        return hosts[index]

    return make


def through_store(hosts: Mapping[int, RayHost]) -> Deliver:
    """Bring versions to the replicas' nodes by way of Ray's object store."""
    folder = Path(tempfile.mkdtemp(prefix="qwen3-distill-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store = StoreChannel(folder)

    async def bring(index: int, version: WeightVersion, channel: WeightChannel) -> WeightChannel:
        store.publish(version, channel.fetch(version))
        return await store.deliver(version, hosts[index])

    return bring


@dataclass(frozen=True)
class RolloutFleetAdapter:
    """Embedded engines of this process as replicas."""

    num_replicas: int
    keeps_cache_over_updates: bool = True

    def build(self, model_dir: Path, *, max_sequences: int = 64) -> StreamingRolloutEngine:
        return rollout_fleet(
            [
                EmbeddedRolloutEngine(
                    model_dir, device="cpu", dtype="float32", max_sequences=max_sequences
                )
                for _ in range(self.num_replicas)
            ]
        )


@dataclass(frozen=True)
class TeacherFleetAdapter:
    """Embedded teachers of this process as members."""

    num_teachers: int
    gives_hidden_states: bool = True
    scores_given_candidates: bool = True
    parity_nats: float = 1e-4
    repeat_nats: float = 1e-5
    tokens_that_show_a_fault: int = 3

    def build(
        self,
        model_dir: Path,
        request: ScoreRequest = SampledRequest(),  # noqa: B008 - frozen
        *,
        batch_tokens: int = 16384,
        chunk_tokens: int = 1024,
    ) -> TeacherScorer:
        return teacher_fleet(
            [
                EmbeddedTeacher(
                    model_dir,
                    request=request,
                    device="cpu",
                    dtype="float32",
                    batch_tokens=batch_tokens,
                    chunk_tokens=chunk_tokens,
                )
                for _ in range(self.num_teachers)
            ]
        )
