"""Runs whose learner has two ranks in a Ray cluster: what is seen of them, and divided weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.trace import read_trace
from qwen3_distill.training.group import GroupLearner
from tests.cluster.test_fleet_runs import (
    assert_nothing_lost_or_twice,
    host_of,
    in_cluster,
    read_json_lines,
)
from tests.pipeline.builders import (
    RecordingReporter,
    Values,
    run_to_end,
    student_bytes,
    tiny_config,
)
from tests.pipeline.faults import StruckLearner
from tests.tiny_models import TinyModels

pytest.importorskip("ray")
pytestmark = pytest.mark.cluster

TRAINING: Values = {"training.own_process": True, "training.threads": 1}


def test_every_replica_teacher_and_rank_of_a_run_is_seen(
    tiny_models: TinyModels, run_dir: Path
) -> None:
    shared = {"replicas": 2, "where": "with_learner"}
    sections = in_cluster(learner={"ranks": 2}, rollouts=shared, teachers=shared)
    reporter = run_to_end(tiny_config(tiny_models, run_dir, sections | TRAINING))
    assert_nothing_lost_or_twice(run_dir, 16)

    members = [f"{kind}_{i}" for kind in ("rollout", "teacher", "rank") for i in range(2)]
    tracks = {
        event["args"]["name"]
        for event in read_trace(run_dir / "trace.json")
        if event.get("name") == "thread_name"
    }
    assert tracks >= set(members)
    rows = read_json_lines(run_dir / "metrics.jsonl")
    for member in members:
        assert rows[-1][f"fleet/{member}_tokens"] > 0
        assert any(row.get(f"fleet/{member}_tok_s", 0) > 0 for row in rows)
        assert rows[-1][f"fleet/{member}_restarts"] == 0
        assert (f"fleet/{member}_queue_tokens" in rows[-1]) == (not member.startswith("rank"))
    # What the ranks read together is what the steps read.
    ranks = sum(rows[-1][f"fleet/rank_{rank}_tokens"] for rank in range(2))
    assert ranks == sum(row["train/input_tokens"] for row in rows)

    logs = {path.name for path in (run_dir / "logs").iterdir()}
    assert logs >= {
        f"{name}-{i}.log" for name in ("rollouts", "teacher", "learner") for i in range(2)
    }
    page = (run_dir / "report.html").read_text()
    assert "rollout replica 1" in page
    assert "rank 1 of the learner" in page
    assert any("give rank 1 of the learner a place" in text for text in reporter.stages)


@pytest.fixture(scope="module")
def divided_run(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divided") / "run"
    run_to_end(divided(tiny_models, folder))
    return folder


def divided(models: TinyModels, folder: Path) -> Any:
    sections = in_cluster(learner={"ranks": 2, "sharded": True})
    return tiny_config(models, folder, sections | TRAINING)


def test_ranks_that_divide_the_weights_train_as_whole_ones(
    tiny_models: TinyModels, run_dir: Path, divided_run: Path
) -> None:
    assert_nothing_lost_or_twice(divided_run, 16)
    (checkpoint, *_) = sorted((divided_run / "checkpoints").iterdir())
    parts = {path.name for path in checkpoint.rglob("weights-*")}
    assert parts == {f"weights-0000{rank}-of-00002.safetensors" for rank in (1, 2)}
    whole = tiny_config(tiny_models, run_dir, in_cluster(learner={"ranks": 2}) | TRAINING)
    run_to_end(whole)
    expected = load_file(run_dir / "student" / "model.safetensors")
    found = load_file(divided_run / "student" / "model.safetensors")
    before = load_file(tiny_models.student / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    moved = max(float((expected[name] - before[name]).abs().max()) for name in expected)
    assert moved > 1e-3, "the tolerance is small against what the steps changed"


def test_a_killed_rank_that_holds_a_part_goes_on_from_the_checkpoint_bit_for_bit(
    tiny_models: TinyModels, run_dir: Path, divided_run: Path
) -> None:
    losses: list[str] = []

    def adapt(parts: Parts) -> Parts:
        learner = parts.learner
        assert isinstance(learner, GroupLearner)
        struck: Any = StruckLearner(learner, 2, host_of(learner.ranks[1]).kill)
        return replace(parts, learner=struck)

    reporter = RecordingReporter()
    assert run(divided(tiny_models, run_dir), reporter, losses.append, adapt)
    (loss,) = losses
    assert "the learner is started again from the last checkpoint: rank 1 of 2 failed" in loss
    assert any("starting the learner again" in text for text in reporter.stages)
    assert_nothing_lost_or_twice(run_dir, 16)
    assert student_bytes(run_dir) == student_bytes(divided_run)
    assert read_json_lines(run_dir / "metrics.jsonl")[-1]["fleet/rank_1_restarts"] == 1
