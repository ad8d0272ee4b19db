"""Lists layouts of a cluster's cards that a search may try: which engines lie on which."""

from collections.abc import Iterator
from typing import Any

from qwen3_distill.config import ClusterConfig, RunConfig
from qwen3_distill.config.cluster import OWN, WITH_LEARNER, ClusterEngines

_MOST_CARDS = 16
"""Clusters of more are left as they are: a search plans every layout many times."""


def layouts(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Iterate over settings that lay the same cards out otherwise, none first.

    Rollout engines stay beside learners: elsewhere every version of merged weights goes through
    memory of the hosts, which the time plan does not count (docs/measured/cards.md). Teachers are
    beside them too, or on one card, two, and so on. Left as they are: engines over several cards,
    on nodes with a named resource or without a card, and a learner whose weights are divided.
    """
    yield {}
    cluster = config.cluster
    cards = None if cluster is None else _equal_cards(cluster)
    if cluster is None or cards is None:
        return
    assert cluster.learner is not None
    assert cluster.rollouts is not None
    assert cluster.teachers is not None
    for apart in range(cards):
        shared = cards - apart
        teachers = (apart, OWN) if apart else (shared, WITH_LEARNER)
        sections = {
            "learner": cluster.learner.model_copy(update={"ranks": shared}),
            "rollouts": _placed(cluster.rollouts, shared, WITH_LEARNER),
            "teachers": _placed(cluster.teachers, *teachers),
        }
        changes = {
            f"cluster.{name}": section.model_dump(mode="json", exclude_defaults=True)
            for name, section in sections.items()
            if section != getattr(cluster, name)
        }
        if changes:
            yield changes


def _equal_cards(cluster: ClusterConfig) -> int | None:
    """Count cards of which each may have any engine; None: the layout is left as it is."""
    learner, rollouts, teachers = cluster.learner, cluster.rollouts, cluster.teachers
    if learner is None or rollouts is None or teachers is None or learner.sharded:
        return None
    fleets = (rollouts, teachers)
    if learner.cards != 1 or any(fleet.cards != 1 for fleet in fleets):
        return None
    if any(fleet.where not in (OWN, WITH_LEARNER) for fleet in fleets):
        return None
    own = sum(fleet.replicas for fleet in fleets if fleet.where == OWN)
    cards = learner.ranks + own
    return cards if 1 < cards <= _MOST_CARDS else None


def _placed(fleet: ClusterEngines, replicas: int, where: str) -> ClusterEngines:
    least = min(fleet.minimum, replicas)
    return fleet.model_copy(update={"replicas": replicas, "where": where, "minimum": least})
