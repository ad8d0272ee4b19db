"""Runs over a Ray cluster of three nodes: the same results, whatever dies on the way."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qwen3_distill.generation.fleet import RolloutFleet
from qwen3_distill.hosts.ray_host import RayHost
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.scoring.fleet import TeacherFleet
from tests.cluster.nodes import CARD, THREE_NODES
from tests.pipeline.builders import (
    RecordingReporter,
    Values,
    run_to_end,
    same_result,
    student_bytes,
    tiny_config,
)
from tests.pipeline.faults import StruckEngine, StruckTeacher
from tests.tiny_models import TinyModels

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.cluster

LOCAL: Values = {
    "generation.own_process": True,
    "generation.threads": 1,
    "scoring.own_process": True,
    "scoring.threads": 1,
}


def in_cluster(**sections: Any) -> Values:
    cluster = {"address": THREE_NODES.address, "card_resource": CARD, "call_timeout_s": 25.0}
    return LOCAL | {"cluster": cluster | sections}


@pytest.fixture(scope="module")
def local_run(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one machine, without Ray."""
    folder = tmp_path_factory.mktemp("local") / "run"
    run_to_end(tiny_config(tiny_models, folder, LOCAL))
    return folder


def trained(folder: Path) -> list[int]:
    """Numbers of the rollouts that were trained on, as often as they were."""
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    return [number for line in lines for number in map(int, json.loads(line)["trained"].split())]


def assert_nothing_lost_or_twice(folder: Path, rollouts: int) -> None:
    assert sorted(trained(folder)) == list(range(rollouts))


def host_of(part: Any) -> RayHost:
    assert isinstance(part.host, RayHost)
    return part.host


def test_one_replica_and_one_teacher_give_the_one_machine_run_bit_for_bit(
    tiny_models: TinyModels, run_dir: Path, local_run: Path
) -> None:
    sections = in_cluster(rollouts={}, teachers={"where": "spark"})
    run_to_end(tiny_config(tiny_models, run_dir, sections))
    assert student_bytes(run_dir) == student_bytes(local_run)


def test_all_three_on_one_card_give_the_one_machine_run_bit_for_bit(
    tiny_models: TinyModels, run_dir: Path, local_run: Path
) -> None:
    sections = in_cluster(
        learner={}, rollouts={"where": "with_learner"}, teachers={"where": "with_learner"}
    )
    training = {"training.own_process": True, "training.threads": 1}
    run_to_end(tiny_config(tiny_models, run_dir, sections | training))
    assert student_bytes(run_dir) == student_bytes(local_run)


def test_two_replicas_sample_each_rollout_once_and_the_result_is_repeatable(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    sections = in_cluster(rollouts={"replicas": 2}, teachers={"replicas": 2})
    for name in ("once", "again"):
        run_to_end(tiny_config(tiny_models, tmp_path / name, sections))
        assert_nothing_lost_or_twice(tmp_path / name, 16)
    assert same_result(tmp_path / "once", tmp_path / "again")
    last = read_json_lines(tmp_path / "once" / "metrics.jsonl")[-1]
    assert last["fleet/rollout_0_tokens"] > 0
    assert last["fleet/rollout_1_tokens"] > 0


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kill_worker(host: RayHost) -> None:
    host.kill()


def kill_actor(host: RayHost) -> None:
    """Kill the actor's process, as the kernel does when memory is short."""
    actor, _ = ray.get(host.actor.pids.remote())
    os.kill(actor, signal.SIGKILL)


def hang_actor(host: RayHost) -> None:
    actor, _ = ray.get(host.actor.pids.remote())
    os.kill(actor, signal.SIGSTOP)


@pytest.mark.parametrize("strike", [kill_worker, kill_actor, hang_actor])
def test_a_replica_that_dies_or_hangs_costs_no_rollout(
    tiny_models: TinyModels, run_dir: Path, local_run: Path, strike: Callable[[RayHost], None]
) -> None:
    """With one replica the result is the one-machine run's: its requests have their own seeds.

    What is asked for again is a smaller batch, whose sums have another order.
    """
    losses: list[str] = []

    def adapt(parts: Parts) -> Parts:
        assert isinstance(parts.engine, RolloutFleet)
        host = host_of(parts.engine.replicas[0])
        engine: Any = StruckEngine(parts.engine, 1, lambda: strike(host))
        return replace(parts, engine=engine)

    config = tiny_config(tiny_models, run_dir, in_cluster(rollouts={}))
    assert run(config, RecordingReporter(), losses.append, adapt)
    assert len([loss for loss in losses if "rollout replica 0 was lost" in loss]) == 1
    assert_nothing_lost_or_twice(run_dir, 16)
    assert largest_difference(run_dir, local_run) < 1e-5  # another token: the learning rate, 1e-3


def largest_difference(left: Path, right: Path) -> float:
    """Return the largest difference between the weights of two trained students."""
    one, other = (load_file(folder / "student" / "model.safetensors") for folder in (left, right))
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_a_teacher_elsewhere_that_is_killed_twice_changes_nothing(
    tiny_models: TinyModels, run_dir: Path, local_run: Path
) -> None:
    losses: list[str] = []

    def adapt(parts: Parts) -> Parts:
        assert isinstance(parts.teacher, TeacherFleet)
        host = host_of(parts.teacher.teachers[0])
        once: Any = StruckTeacher(parts.teacher, 0, host.kill)
        twice: Any = StruckTeacher(once, 2, host.kill)
        return replace(parts, teacher=twice)

    sections = in_cluster(teachers={"where": "spark"})
    assert run(
        tiny_config(tiny_models, run_dir, sections), RecordingReporter(), losses.append, adapt
    )
    assert len([loss for loss in losses if "teacher 0 was lost" in loss]) == 2
    assert student_bytes(run_dir) == student_bytes(local_run)
    last = read_json_lines(run_dir / "metrics.jsonl")[-1]
    assert last["score/server_restarts"] == 2


def test_a_raylet_that_dies_takes_its_replica_to_another_node(
    tiny_models: TinyModels, run_dir: Path
) -> None:
    losses: list[str] = []
    struck: list[Any] = []

    def adapt(parts: Parts) -> Parts:
        assert isinstance(parts.engine, RolloutFleet)
        fleet = parts.engine

        def strike() -> None:
            place = host_of(fleet.replicas[1]).place
            assert place.facts is not None
            nodes = THREE_NODES.cluster.list_all_nodes()
            (node,) = [node for node in nodes if node.node_id == place.facts.node_id]
            struck.append(node)
            THREE_NODES.kill_raylet(node)

        engine: Any = StruckEngine(parts.engine, 1, strike)
        return replace(parts, engine=engine)

    sections = in_cluster(rollouts={"replicas": 2, "where": "spark"})
    try:
        assert run(
            tiny_config(tiny_models, run_dir, sections), RecordingReporter(), losses.append, adapt
        )
    finally:
        for node in struck:
            THREE_NODES.cluster.remove_node(node, allow_graceful=False)
            THREE_NODES.add(1)
    assert any("rollout replica 1 was lost" in loss for loss in losses)
    assert_nothing_lost_or_twice(run_dir, 16)
