"""Checks whether a cluster has the places that a run asks for. No Ray here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qwen3_distill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PlaceSpec:
    """Cards of one node, asked for one engine or for several that share them."""

    name: str
    """In messages, e.g. "rollout replica 1"."""
    cards: int = 0
    resource: str | None = None
    """A Ray resource that the node must have."""
    on_this_machine: bool = False
    """Whether the node must be the one of the run's own process."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Files that must exist on the node, by the setting that names each."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the cluster that is alive."""

    node_id: str
    address: str
    cards: int
    resources: frozenset[str]
    is_this_machine: bool

    def __str__(self) -> str:
        return f"{self.address} ({self.cards} cards)"


def check_fit(places: Sequence[PlaceSpec], nodes: Sequence[Node], card_resource: str) -> None:
    """Check that the places fit the cluster when nothing else runs on it.

    Raises:
        ConfigError: says what is there and what was asked.
    """
    left = {node.node_id: node.cards for node in nodes}
    # The places that may lie on the fewest nodes choose first, and of those the largest.
    choices = {place.name: [node for node in nodes if _may_hold(node, place)] for place in places}
    for place in sorted(places, key=lambda place: (len(choices[place.name]), -place.cards)):
        free = [node for node in choices[place.name] if left[node.node_id] >= place.cards]
        if not free:
            raise ConfigError(_does_not_fit(place, places, nodes, card_resource))
        chosen = min(free, key=lambda node: left[node.node_id])
        left[chosen.node_id] -= place.cards


def _may_hold(node: Node, place: PlaceSpec) -> bool:
    if place.on_this_machine and not node.is_this_machine:
        return False
    return place.resource is None or place.resource in node.resources


def _does_not_fit(
    place: PlaceSpec, places: Sequence[PlaceSpec], nodes: Sequence[Node], card_resource: str
) -> str:
    there = ", ".join(str(node) for node in nodes)
    if place.resource is not None and not any(place.resource in node.resources for node in nodes):
        return (
            f"{place.name} is to run on a node with the Ray resource {place.resource!r}, and no "
            f"node of the cluster has it ({there}); start Ray there with "
            f"--resources='{{\"{place.resource}\": 1}}', or change `where`"
        )
    asked = ", ".join(f"{other.name}: {other.cards}" for other in places if other.cards)
    total = sum(other.cards for other in places)
    where = " on the machine of the run" if place.on_this_machine else ""
    return (
        f"the run asks for {total} cards ({card_resource}) and the cluster has "
        f"{sum(node.cards for node in nodes)}: there is no room for {place.name}{where}. Nodes: "
        f"{there}. Asked: {asked}. Lower cluster.*.replicas or cards, let engines share with "
        "where=with_learner, or add nodes"
    )
