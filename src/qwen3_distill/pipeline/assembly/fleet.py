"""Puts the engines of a run's `cluster` section into their places, as fleets."""

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

from qwen3_distill.config import (
    ClusterConfig,
    ClusterEngines,
    GenerationConfig,
    RunConfig,
    ScoringConfig,
    TrainingConfig,
)
from qwen3_distill.config.cluster import OWN, WITH_LEARNER
from qwen3_distill.environments.installed import engine_python
from qwen3_distill.errors import ConfigError
from qwen3_distill.generation.fleet import RolloutFleet
from qwen3_distill.hosts.cluster import Cluster, Place
from qwen3_distill.hosts.host import MakeHost, WorkerSpec
from qwen3_distill.hosts.members import Span
from qwen3_distill.hosts.places import PlaceSpec
from qwen3_distill.hosts.ray_host import RayHost
from qwen3_distill.pipeline.assembly.plan import engine_log
from qwen3_distill.ports import (
    ReplayingLearner,
    StreamingRolloutEngine,
    TeacherScorer,
    WeightChannel,
)
from qwen3_distill.scoring.fleet import TeacherFleet
from qwen3_distill.training.group import GroupLearner
from qwen3_distill.training.hosted import HostedLearner
from qwen3_distill.types import WeightVersion
from qwen3_distill.weights.per_card import PerCardChannel
from qwen3_distill.weights.store import deliver

BuildEngine: TypeAlias = Callable[[RunConfig, MakeHost, str], StreamingRolloutEngine]
BuildTeacher: TypeAlias = Callable[[RunConfig, MakeHost, str], TeacherScorer]
BuildRank: TypeAlias = Callable[[MakeHost, str], HostedLearner]
"""They build one member: from a config without restarts, a place, and a suffix of file names."""


def ignore(message: str) -> None:
    """A ``warn`` for callers who have nobody to tell."""


def require_cluster(cluster: "RunCluster | None", name: str) -> "RunCluster":
    """Return the cluster of a run.

    Raises:
        ConfigError: the command has none: it starts one engine, on this machine.
    """
    if cluster is None:
        raise ConfigError(
            f"this command runs engines on this machine only, and the config has cluster.{name}; "
            "add cluster=null to the command"
        )
    return cluster


class RunCluster:
    """The places of a run's engines.

    Args:
        config: the run.
        section: its ``cluster``.
        warn: told of engines that are lost.
    """

    def __init__(
        self, config: RunConfig, section: ClusterConfig, warn: Callable[[str], None]
    ) -> None:
        config = _absolute(config)
        self._config = config
        self._section = section
        self._warn = warn
        self.cluster = Cluster(section, log=engine_log(config, "ray"))
        self._fleets: list[RolloutFleet | TeacherFleet] = []
        self._ranks: list[Place] = []
        self._group: GroupLearner | None = None
        if section.learner is not None:
            needs = _needs("training", config.training, config.student.model)
            self._ranks = [
                self.cluster.place(
                    PlaceSpec(
                        name=f"rank {rank} of the learner",
                        cards=section.learner.cards,
                        on_this_machine=rank == 0,  # it writes the run folder
                        needs=needs,
                    )
                )
                for rank in range(section.learner.ranks)
            ]

    def learner(self, build: BuildRank) -> ReplayingLearner:
        """Build the learner: one host, or a group of ranks with one each."""
        ranks = [
            build(partial(RayHost, place=place), f"-{i}" if len(self._ranks) > 1 else "")
            for i, place in enumerate(self._ranks)
        ]
        if len(ranks) == 1:
            return ranks[0]
        section = self._section.learner
        self._group = GroupLearner(
            ranks,
            timeout_s=self._config.training.hang_timeout_s,
            sharded=section is not None and section.sharded,
            rendezvous=self._ranks[0].reserved_port,
        )
        return self._group

    def rollout_fleet(self, build: BuildEngine) -> RolloutFleet:
        """Build the rollout engines, one in each place."""
        section, config = self._section.rollouts, self._config
        assert section is not None
        hosts: dict[int, RayHost] = {}
        needs = _needs("generation", config.generation, config.student.model)
        member = _without_restarts(config, "generation")
        engines = [
            build(member, self._keep_host(hosts, i, "rollout replica", section, needs), f"-{i}")
            for i in range(section.replicas)
        ]

        async def bring(
            index: int, version: WeightVersion, channel: WeightChannel
        ) -> WeightChannel:
            if isinstance(channel, PerCardChannel):
                return channel.of_card(index)
            host = hosts[index]
            is_here = self._section.address is None or host.place.spec.on_this_machine
            return channel if is_here else await deliver(version, channel, host)

        fleet = RolloutFleet(
            engines,
            max_restarts=config.generation.max_restarts,
            minimum=section.minimum,
            deliver=bring,
            warn=self._warn,
        )
        self._fleets.append(fleet)
        return fleet

    def teacher_fleet(self, build: BuildTeacher) -> TeacherFleet:
        """Build the teachers, one in each place."""
        section, config = self._section.teachers, self._config
        assert section is not None
        scoring = config.teacher
        needs = _needs("scoring", scoring, scoring.model)
        member = _without_restarts(config, "scoring")
        teachers = [
            build(member, self._keep_host({}, i, "teacher", section, needs), f"-{i}")
            for i in range(section.replicas)
        ]
        fleet = TeacherFleet(
            teachers,
            max_restarts=scoring.max_restarts,
            minimum=section.minimum,
            warn=self._warn,
        )
        self._fleets.append(fleet)
        return fleet

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the engines and of a group's ranks, as their metrics and tracks have them."""
        found: list[str] = []
        for fleet in self._fleets:
            is_rollouts = isinstance(fleet, RolloutFleet)
            engines = fleet.replicas if is_rollouts else fleet.teachers
            found += [f"{'rollout' if is_rollouts else 'teacher'}_{i}" for i in range(len(engines))]
        ranks = () if self._group is None else self._group.ranks
        return (*found, *(f"rank_{i}" for i in range(len(ranks))))

    @property
    def counters(self) -> Mapping[str, float]:
        """Figures of a group's ranks; the fleets have their own."""
        return {} if self._group is None else self._group.counters

    def observe(self, span: Span) -> None:
        """Have the work of every engine and rank recorded, each on a track of its own."""
        for fleet in self._fleets:
            fleet.span = span
        if self._group is not None:
            self._group.span = span

    async def start(self, say: Callable[[str], None]) -> None:
        """Connect to Ray and reserve the places; see `Cluster.start`."""
        self.cluster.say = say
        for fleet in self._fleets:
            fleet.tell(say)
        await self.cluster.start()

    async def close(self) -> None:
        """Give the places back."""
        await self.cluster.close()

    def _keep_host(
        self,
        hosts: dict[int, RayHost],
        index: int,
        name: str,
        section: ClusterEngines,
        needs: dict[str, str],
    ) -> MakeHost:
        """Return what makes the host of a member, and keeps it by the member's index."""
        if section.where == WITH_LEARNER:
            place = self._ranks[index]
        else:
            place = self.cluster.place(
                PlaceSpec(
                    name=f"{name} {index}",
                    cards=section.cards,
                    resource=None if section.where == OWN else section.where,
                    needs=needs,
                )
            )

        def make(spec: WorkerSpec, place: Place) -> RayHost:
            hosts[index] = RayHost(spec, place)
            return hosts[index]

        return partial(make, place=place)


def _without_restarts(config: RunConfig, section: str) -> RunConfig:
    """Copy the config for a member of a fleet: the fleet restarts it, and counts."""
    member = getattr(config, section).model_copy(update={"max_restarts": 0})
    return config.model_copy(update={section: member})


def _absolute(config: RunConfig) -> RunConfig:
    """Copy the config with whole paths: another node's processes run in another directory."""
    changes: dict[str, object] = {
        "student": config.student.model_copy(
            update={"model": os.path.abspath(config.student.model)}
        )
    }
    for name in ("generation", "scoring", "training"):
        section = getattr(config, name)
        if section is None:  # no teacher
            continue
        update = {}
        if section.kind != "embedded" and section.python and os.sep in section.python:
            update["python"] = os.path.abspath(section.python)
        if name == "scoring":
            update["model"] = os.path.abspath(section.model)
        changes[name] = section.model_copy(update=update)
    return config.model_copy(update=changes)


def _needs(
    name: str, section: GenerationConfig | ScoringConfig | TrainingConfig, model: str
) -> dict[str, str]:
    """List the files that a node must have, by setting: an interpreter and the model."""
    python = section.interpreter or sys.executable
    if section.kind in ("vllm", "unsloth") and name != "scoring":  # a server's is found on its node
        python = engine_python(section.kind, name, section.interpreter)
    role = "scoring.model" if name == "scoring" else "student.model"
    return {f"{name}.python": python, role: model}
