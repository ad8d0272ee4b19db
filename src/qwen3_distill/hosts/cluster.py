"""Ray: connects to a cluster or starts one, and reserves the places of a run's engines.

A place is one bundle of a placement group, so it is never split over nodes. A small actor, the
keeper, holds the place's cards as long as the run needs them; the engines there are told the cards
by number, so that several may share them. Ray restarts nothing: the fleets decide.
"""

import asyncio
import contextlib
import importlib.util
import logging
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_distill.config.cluster import ClusterConfig
from qwen3_distill.errors import ConfigError, EngineLost, EngineStartError
from qwen3_distill.hosts.own_ray import OwnRay
from qwen3_distill.hosts.package import package_fingerprint
from qwen3_distill.hosts.places import Node, PlaceSpec, check_fit
from qwen3_distill.hosts.reserved_port import ReservedPort
from qwen3_distill.utils.variables import set_in_environment

_GIB = 1 << 30
_TICKS = 10
"""Parts that the time for an answer is counted in."""
_CONNECT_TIMEOUT_S = 5.0
_TOKEN_CPU = 0.001
"""Asked for with every place: a bundle cannot be empty."""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """A keeper's report about its node."""

    address: str
    node_id: str
    devices: tuple[str, ...] | None
    """The cards by CUDA's numbers; None if they are no GPUs."""
    package: str
    missing: tuple[str, ...]
    """Settings whose files the node lacks."""


class Place:
    """Cards of one node, for one engine or for several that share them.

    Args:
        spec: what was asked for.
        cluster: that it belongs to.
    """

    def __init__(self, spec: PlaceSpec, cluster: "Cluster") -> None:
        self.spec = spec
        self.cluster = cluster
        self._group: Any = None
        self._keeper: Any = None
        self._facts: NodeFacts | None = None
        self._lock = asyncio.Lock()

    @property
    def facts(self) -> NodeFacts | None:
        """The node's facts; None before the place was reserved."""
        return self._facts

    async def ready(self) -> NodeFacts:
        """Return the facts of the node that holds the place, which is another one after its death.

        Raises:
            EngineStartError: the cluster does not give the place in time, or the node cannot be
                used; the message says why.
        """
        async with self._lock:
            if self._keeper is not None:
                with contextlib.suppress(EngineLost):
                    return await self._ask_keeper(self.cluster.config.call_timeout_s)
                self.cluster.kill(self._keeper)
                self._keeper = None
            self.cluster.say(f"waiting for the cluster to give {self.spec.name} a place")
            self._keeper = self.cluster.make_keeper(self.spec, self._reserve())
            try:
                self._facts = await self._ask_keeper(self.cluster.config.place_timeout_s)
            except EngineLost as error:
                self.cluster.kill(self._keeper)
                self._keeper = None
                raise EngineStartError(
                    f"{self.spec.name} got no place in the cluster within "
                    f"{self.cluster.config.place_timeout_s:g} s (cluster.place_timeout_s): {error}"
                ) from None
            _check_node(self.spec, self._facts)
            return self._facts

    def strategy(self) -> Any:
        """Ray's scheduling strategy for an actor in this place."""
        return self.cluster.strategy(self._reserve())

    def reserved_port(self) -> ReservedPort:
        """Reserve a port of the node, which is this machine, at its address in the cluster."""
        assert self.spec.on_this_machine
        assert self._facts is not None
        return ReservedPort(self._facts.address)

    def release(self) -> None:
        """Give the cards back."""
        if self._keeper is not None:
            self.cluster.kill(self._keeper)
        if self._group is not None:
            self.cluster.remove_group(self._group)
        self._keeper = self._group = self._facts = None

    def _reserve(self) -> Any:
        if self._group is None:
            self._group = self.cluster.make_group(self.spec)
        return self._group

    async def _ask_keeper(self, timeout_s: float) -> NodeFacts:
        needs = dict(self.spec.needs)
        return await answer_of(
            self._keeper.facts.remote(needs), timeout_s, f"the node of {self.spec.name}"
        )


class Cluster:
    """A connection to Ray.

    Args:
        config: the run's section.
        log: file that takes the output of a Ray that is started here.
        say: told what is waited for.
    """

    def __init__(
        self, config: ClusterConfig, *, log: Path, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.config = config
        self._log = log
        self.say = say
        self._places: list[Place] = []
        self._own: OwnRay | None = None
        self._variables = contextlib.ExitStack()
        self._is_connected = False

    def place(self, spec: PlaceSpec) -> Place:
        """Ask for a place; it is reserved by `start`."""
        place = Place(spec, self)
        self._places.append(place)
        return place

    @property
    def places(self) -> Sequence[Place]:
        return tuple(self._places)

    @property
    def scratch_root(self) -> Path | None:
        """Folder for the engines' files on every node; None: each node chooses."""
        return None if self._own is None else self._own.scratch

    async def start(self) -> None:
        """Connect to Ray, and reserve all places.

        Raises:
            ConfigError: Ray is not installed, cannot be reached, or lacks what is asked for.
            EngineStartError: Ray does not start, or a node cannot be used.
        """
        if not ray_is_installed():
            raise ConfigError(
                "the config has a cluster section, and Ray is not installed; "
                "pip install 'qwen3-distill[cluster]'"
            )
        try:
            await self._connect()
            check_fit(
                [place.spec for place in self._places], self._nodes(), self.config.card_resource
            )
            for place in self._places:  # one at a time: a place that is asked for later sees less
                await place.ready()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Give all places back, and end a Ray that was started here. May be called repeatedly."""
        for place in self._places:
            with contextlib.suppress(Exception):
                place.release()
        if self._is_connected:
            import ray

            self._is_connected = False
            ray.shutdown()
        if self._own is not None:
            await self._own.close()
            self._own = None
        self._variables.close()

    # --- Ray's own objects ------------------------------------------------------------------------

    def make_group(self, spec: PlaceSpec) -> Any:
        from ray.util.placement_group import placement_group

        bundle: dict[str, float] = {"CPU": _TOKEN_CPU}
        if spec.cards:
            bundle[self.config.card_resource] = spec.cards
        if spec.resource is not None:
            bundle[spec.resource] = _TOKEN_CPU
        if not spec.on_this_machine:
            return placement_group([bundle], strategy="STRICT_PACK")
        labels = [{"ray.io/node-id": self._this_node()}]
        return placement_group([bundle], strategy="STRICT_PACK", bundle_label_selector=labels)

    def remove_group(self, group: Any) -> None:
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(group)

    def strategy(self, group: Any) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)

    def make_keeper(self, spec: PlaceSpec, group: Any) -> Any:
        import ray

        holds_gpus = self.config.card_resource == "GPU"
        cards: dict[str, Any] = {}
        if spec.cards:
            cards = (
                {"num_gpus": spec.cards}
                if holds_gpus
                else {"resources": {self.config.card_resource: spec.cards}}
            )
        return (
            ray.remote(_Keeper)
            .options(
                num_cpus=0,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=self.strategy(group),
                **cards,
            )
            .remote(holds_gpus and spec.cards > 0)
        )

    def kill(self, actor: Any) -> None:
        """End an actor; one that is gone is no error."""
        import ray

        with contextlib.suppress(Exception):
            ray.kill(actor, no_restart=True)

    def _nodes(self) -> list[Node]:
        import ray

        here = self._this_node()
        return [
            Node(
                node_id=node["NodeID"],
                address=node["NodeManagerAddress"],
                cards=int(node["Resources"].get(self.config.card_resource, 0)),
                resources=frozenset(node["Resources"]),
                is_this_machine=node["NodeID"] == here,
            )
            for node in ray.nodes()
            if node["Alive"]
        ]

    def _this_node(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()

    async def _connect(self) -> None:
        address = self.config.address
        if address is None:
            self.say("starting Ray on this machine")
            address = await self._start_own()
        else:
            self.say(f"connecting to the Ray cluster at {address}")
            await asyncio.to_thread(_check_reachable, address)
        # Ray would tell the workers of actors without GPUs that there are none.
        self._variables.enter_context(
            set_in_environment({"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})
        )
        import ray

        # It warns of the thread that it is started in.
        logging.getLogger("ray._private.worker").setLevel(logging.ERROR)

        def connect() -> None:
            ray.init(address=address, log_to_driver=False, configure_logging=False)

        try:
            # In a thread: in the main one Ray would take over SIGTERM.
            await asyncio.to_thread(connect)
        except Exception as error:
            raise ConfigError(
                f"cannot connect to the Ray cluster at {address}: {_last_words(error)}; check "
                "cluster.address, that the versions of Ray and Python are the same there, and "
                "RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH if the cluster has a token"
            ) from error
        self._is_connected = True

    async def _start_own(self) -> str:
        config = self.config
        is_gpu = config.card_resource == "GPU"
        store = config.object_store_gib
        self._own = OwnRay(
            interface=config.interface,
            settings={
                "num_gpus": config.cards_here if is_gpu else None,
                "resources": None if is_gpu else {config.card_resource: config.cards_here or 1},
                "object_store_memory": None if store is None else int(store * _GIB),
            },
            log=self._log,
        )
        self._variables.enter_context(set_in_environment(self._own.variables()))
        return await self._own.start()


class _Keeper:
    """Runs on a node: holds a place's cards and tells about the node."""

    def __init__(self, has_gpus: bool) -> None:
        self._has_gpus = has_gpus

    def facts(self, needs: dict[str, str]) -> NodeFacts:
        import ray

        missing = [f"{setting}={path}" for setting, path in needs.items() if not _is_there(path)]
        return NodeFacts(
            address=ray.util.get_node_ip_address(),
            node_id=ray.get_runtime_context().get_node_id(),
            devices=tuple(map(str, ray.get_gpu_ids())) if self._has_gpus else None,
            package=package_fingerprint(),
            missing=tuple(missing),
        )


def ray_is_installed() -> bool:
    return importlib.util.find_spec("ray") is not None


async def answer_of(ref: Any, timeout_s: float, who: str) -> Any:
    """Await an actor's answer.

    The limit is counted in ticks of this event loop: a long step of an engine in this process is
    one tick, however long it is.

    Raises:
        EngineLost: the actor or its node died, or did not answer in time.
    """
    from ray.exceptions import RayError, RayTaskError

    answer = asyncio.wrap_future(ref.future())
    try:
        for _ in range(_TICKS):
            if (await asyncio.wait({answer}, timeout=timeout_s / _TICKS))[0]:
                return answer.result()
    except RayTaskError as error:
        raise EngineLost(f"{who} failed: {_last_words(error)}") from error
    except RayError as error:
        what = _last_words(error).partition(" Worker exit type")[0]  # general advice follows
        raise EngineLost(f"{who} died: {what}") from None
    finally:
        answer.cancel()
    raise EngineLost(f"{who} did not answer for {timeout_s:g} s")


def _check_node(spec: PlaceSpec, facts: NodeFacts) -> None:
    here = package_fingerprint()
    if facts.package != here:
        raise EngineStartError(
            f"node {facts.address} (of {spec.name}) has qwen3-distill {facts.package}, and the run "
            f"has {here}: records would not be understood; install the same version on all nodes"
        )
    if facts.missing:
        raise EngineStartError(
            f"node {facts.address} (of {spec.name}) does not have {', '.join(facts.missing)}; "
            "make the engine's environment and copy the model there under the same path, or give "
            "all nodes a shared folder"
        )


def _is_there(path: str) -> bool:
    return os.path.exists(path) or (os.sep not in path and shutil.which(path) is not None)


def _check_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"cluster.address={address} is no address of a Ray cluster; write host:port, e.g. "
            "10.0.0.1:6379, as `ray start --head` shows it"
        )
    try:
        socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at cluster.address={address}: {error}; start it there with "
            "`ray start --head`, and check the firewall"
        ) from None


def _last_words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
