"""Where the engines of a run with several cards or machines run; absent by default."""

from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from qwen3_distill.config.base import Gib, PathText, PositiveFloat, PositiveInt, Schema

WITH_LEARNER = "with_learner"
OWN = "own"


def _plain_name(name: str) -> str:
    if not name or not name.isprintable() or name != name.strip() or " " in name:
        raise ValueError(
            f"{name!r} is no place; write {WITH_LEARNER}, {OWN}, or the name of a resource that "
            "the nodes were given (`ray start --resources`)"
        )
    return name


Where: TypeAlias = Annotated[str, AfterValidator(_plain_name)]
"""``with_learner``: on the learner's cards; ``own``: on cards that no other engine has, on any
node; any other name: on a node with the Ray resource of that name."""


class ClusterEngines(Schema):
    """A fleet of one kind of engine."""

    replicas: PositiveInt = 1
    """Engines of this kind."""
    cards: Annotated[int, Field(ge=0)] = 1
    """Cards of each; 0: none, the engine computes on the CPU."""
    where: Where = OWN
    """``with_learner``: on the learner's cards, which they share; ``own``: on cards of their own,
    on any node; any other name: on cards of their own, on a node that was given the Ray resource
    of that name (``ray start --resources='{"name": 1}'``)."""
    minimum: PositiveInt = 1
    """With fewer engines left, the run stops; it can be continued. An engine that died more often
    than its section's ``max_restarts`` is not started again."""

    @model_validator(mode="after")
    def _minimum_within_replicas(self) -> Self:
        if self.minimum > self.replicas:
            raise ValueError(
                f"minimum={self.minimum} of replicas={self.replicas} engines can never be left; "
                "lower minimum"
            )
        return self


class ClusterLearner(Schema):
    """The learner, on cards that Ray reserves for it."""

    ranks: PositiveInt = 1
    """Ranks that take each step together, a part of its rollouts each. The first is on the machine
    of the run. A run continues bit for bit with the same number of ranks only."""
    cards: Annotated[int, Field(ge=0, le=1)] = 1
    """Cards of each rank; 0: none, it computes on the CPU."""
    sharded: bool = False
    """Divide the layers' weights, gradients and moments over the ranks, for full tuning that does
    not fit one card (``training.kind: embedded``). A layer is gathered for each of its passes, so
    where whole ones fit, they are faster. A checkpoint may be continued either way."""

    @model_validator(mode="after")
    def _divides_over_several(self) -> Self:
        if self.sharded and self.ranks == 1:
            raise ValueError(
                "cluster.learner.sharded with ranks=1: there is no other rank to divide the "
                "weights with; raise ranks, or use sharded=false"
            )
        return self


class ClusterConfig(Schema):
    """Engines on several cards or machines, run by Ray (extra ``[cluster]``); see
    docs/cluster.md."""

    address: Annotated[str, Field(min_length=1)] | None = None
    """Address of an existing Ray cluster, e.g. ``10.0.0.1:6379``; null: the run starts Ray on this
    machine and ends it."""
    interface: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address that Ray listens on when the run starts it. A Ray cluster trusts its network."""
    card_resource: Annotated[str, Field(min_length=1)] = "GPU"
    """Ray's name for a card. Another name than ``GPU`` places engines on nodes without any, for
    tests."""
    cards_here: PositiveInt | None = None
    """Cards of this machine when the run starts Ray; null: the GPUs that Ray finds."""
    rollouts: ClusterEngines | None = None
    """Rollout engines; null: one on this machine, as without a cluster."""
    teachers: ClusterEngines | None = None
    """Teachers; null: one on this machine, as without a cluster. A teacher on another machine is
    ``{where: its_resource}``."""
    learner: ClusterLearner | None = None
    """The learner's cards; null: it runs as without a cluster."""
    weights_folder: PathText | None = None
    """Folder that all nodes share, through which weights travel; null: Ray's object store."""
    call_timeout_s: PositiveFloat = 60.0
    """A node that does not answer for this long is lost, with the engines on it."""
    place_timeout_s: PositiveFloat = 120.0
    """Limit for the cluster to give an engine its place: at the start, and after its node died."""
    object_store_gib: Gib | None = None
    """Memory of Ray's object store when the run starts Ray; null: Ray's default."""

    @model_validator(mode="after")
    def _needs_an_engine(self) -> Self:
        if self.rollouts is None and self.teachers is None and self.learner is None:
            raise ValueError(
                "cluster names no engine: give it rollouts, teachers or learner, or drop the "
                "section"
            )
        return self

    @model_validator(mode="after")
    def _learner_is_there_to_share_cards_with(self) -> Self:
        for name, engines in (("rollouts", self.rollouts), ("teachers", self.teachers)):
            if engines is None or engines.where != WITH_LEARNER:
                continue
            if self.learner is None:
                raise ValueError(
                    f"cluster.{name}.where={WITH_LEARNER} needs cluster.learner, which says how "
                    "many cards it has; add `learner: {}`"
                )
            if engines.replicas > self.learner.ranks:
                raise ValueError(
                    f"cluster.{name}.where={WITH_LEARNER} with replicas={engines.replicas}, and "
                    f"the learner has {self.learner.ranks} ranks to share cards with; raise "
                    "cluster.learner.ranks, or lower replicas"
                )
            if engines.cards != self.learner.cards:
                raise ValueError(
                    f"cluster.{name}.where={WITH_LEARNER} with cards={engines.cards}, and the "
                    f"learner has {self.learner.cards}; give both the same number"
                )
        return self

    @model_validator(mode="after")
    def _node_resource_needs_a_cluster(self) -> Self:
        for name, engines in (("rollouts", self.rollouts), ("teachers", self.teachers)):
            if self.address is None and engines and engines.where not in (WITH_LEARNER, OWN):
                raise ValueError(
                    f"cluster.{name}.where={engines.where} is a node's resource, and with "
                    "cluster.address=null there is this machine only; set cluster.address, or "
                    f"where={OWN} or {WITH_LEARNER}"
                )
        return self

    @model_validator(mode="after")
    def _settings_of_an_own_ray(self) -> Self:
        if self.address is None:
            return self
        for name in ("cards_here", "object_store_gib"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"cluster.{name} is of a Ray that the run starts, and cluster.address names "
                    "an existing one: drop one of the two"
                )
        return self
