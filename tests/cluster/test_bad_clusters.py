"""A cluster that cannot hold the run is refused with one message, before any engine starts."""

from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.hosts import cluster as cluster_module
from qwen3_distill.hosts import package
from tests.cluster.nodes import CARD, THREE_NODES
from tests.pipeline.builders import Values, refused, tiny_values, write_config
from tests.tiny_models import TinyModels

OWN: Values = {"generation.own_process": True, "scoring.own_process": True}


@pytest.fixture
def refuses(tiny_models: TinyModels, tmp_path: Path) -> Any:
    def check(cluster: Values, words: list[str], changes: Values | None = None) -> None:
        values = tiny_values(tiny_models, tmp_path / "run", OWN | (changes or {}))
        values["cluster"] = cluster
        file = write_config(tmp_path / "config.yaml", values)
        refused("run", "--config", file, words=words)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    return check


def test_without_ray_the_extra_is_named(refuses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "ray_is_installed", lambda: False)
    refuses({"rollouts": {}}, ["Ray is not installed", "qwen3-distill[cluster]"])


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("nowhere", ["cluster.address=nowhere", "host:port"]),
        ("127.0.0.1:9", ["no Ray cluster answers at cluster.address=127.0.0.1:9", "firewall"]),
    ],
)
def test_an_address_without_a_cluster_is_refused(
    refuses: Any, address: str, words: list[str]
) -> None:
    pytest.importorskip("ray")
    refuses({"rollouts": {}, "address": address}, words)


def test_a_command_that_starts_one_engine_refuses_a_fleet(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    values = tiny_values(tiny_models, tmp_path / "run", OWN | {"cluster": {"rollouts": {}}})
    file = write_config(tmp_path / "config.yaml", values)
    words = ["runs engines on this machine only", "cluster.rollouts", "cluster=null"]
    refused("generate", "--config", file, words=words)


@pytest.mark.cluster
def test_more_cards_than_the_cluster_has_are_refused(refuses: Any) -> None:
    section = {"address": THREE_NODES.address, "card_resource": CARD}
    refuses(
        section | {"rollouts": {"replicas": 8}},
        ["asks for 8 cards (slot) and the cluster has 6", "rollout replica"],
    )
    refuses(
        section | {"teachers": {"where": "spark9"}}, ["'spark9'", "no node of the cluster has it"]
    )


@pytest.mark.cluster
def test_another_version_of_this_package_on_a_node_is_refused(
    refuses: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = package.package_fingerprint()
    monkeypatch.setattr(cluster_module, "package_fingerprint", lambda: "0.0.0+other")
    refuses(
        {"address": THREE_NODES.address, "card_resource": CARD, "rollouts": {}},
        [f"has qwen3-distill {there}", "the run has 0.0.0+other", "rollout replica 0"],
    )


@pytest.mark.cluster
def test_a_node_without_the_engines_environment_is_named(
    refuses: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    refuses(
        {"address": THREE_NODES.address, "card_resource": CARD, "rollouts": {}},
        ["node ", "(of rollout replica 0) does not have generation.python=/nowhere/python"],
    )
