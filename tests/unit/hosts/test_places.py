"""What a run asks of a cluster fits it, or one message says what is there and what was asked."""

import pytest

from qwen3_distill.errors import ConfigError
from qwen3_distill.hosts.places import Node, PlaceSpec, check_fit


def node(name: str, cards: int, *resources: str, here: bool = False) -> Node:
    return Node(
        node_id=name,
        address=name,
        cards=cards,
        resources=frozenset(resources),
        is_this_machine=here,
    )


def place(name: str, cards: int = 1, resource: str | None = None, here: bool = False) -> PlaceSpec:
    return PlaceSpec(name=name, cards=cards, resource=resource, on_this_machine=here)


NODES = [node("a", 2, here=True), node("b", 1, "spark"), node("c", 4)]


def test_places_that_fit_are_accepted_whatever_their_order() -> None:
    places = [place("small", 1), place("large", 4), place("learner", 2, here=True)]
    check_fit(places, NODES, "GPU")
    check_fit(places[::-1], NODES, "GPU")


def test_a_place_is_never_split_over_nodes() -> None:
    with pytest.raises(ConfigError, match="no room for wide"):
        check_fit([place("wide", 5)], NODES, "GPU")


def test_more_cards_than_there_are_are_refused_with_both_numbers() -> None:
    places = [place(f"replica {i}") for i in range(8)]
    with pytest.raises(ConfigError, match=r"asks for 8 cards \(GPU\) and the cluster has 7.*a \(2"):
        check_fit(places, NODES, "GPU")


def test_a_resource_that_no_node_has_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'spark2'.*no node of the cluster has it"):
        check_fit([place("teacher 0", resource="spark2")], NODES, "GPU")


def test_the_learner_stays_on_the_machine_of_the_run() -> None:
    with pytest.raises(ConfigError, match="no room for the learner on the machine of the run"):
        check_fit([place("the learner", 3, here=True)], NODES, "GPU")
