"""Runs with replay: what they draw, and that they resume bit for bit."""

from pathlib import Path

import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.jsonl import read_jsonl
from tests.pipeline.builders import (
    RecordingReporter,
    Values,
    raise_warning,
    run_to_end,
    same_result,
    slowed,
    student_bytes,
    tiny_config,
)
from tests.pipeline.test_streaming import ALONE, Batches, Stop, streaming
from tests.tiny_models import TinyModels

REPLAY: Values = {
    "steps": 8,
    "replay": {
        "capacity_tokens": 2000,
        "max_age_steps": 6,
        "updates_per_batch": 2,
        "law": {"kind": "proportional", "alpha": 0.6},
    },
}


def trained(config: RunConfig) -> list[str]:
    return [record["trained"] for record in read_jsonl(config.output_path / "ledger.jsonl")]


def test_every_other_step_takes_in_rollouts_and_all_of_them_train(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", REPLAY)
    run_to_end(config)
    assert trained(config) == ["0 1 2 3", "", "4 5 6 7", "", "8 9 10 11", "", "12 13 14 15", ""]
    records = read_jsonl(config.output_path / "metrics.jsonl")
    held = [record["replay/rollouts"] for record in records]
    assert held == [4, 4, 8, 8, 12, 12, 16, 12]  # at step 7 the first four are 7 steps old
    assert all(record["tokens/trained"] > 0 for record in records)
    assert max(record["weights/lag_steps"] for record in records) > 1


@pytest.mark.parametrize("pipeline", ["sequential", "streaming"])
@pytest.mark.parametrize("crash_after", [3, 6])
def test_a_run_with_replay_that_crashed_ends_as_one_that_did_not(
    tiny_models: TinyModels, tmp_path: Path, pipeline: str, crash_after: int
) -> None:
    changes = {**REPLAY, **ALONE, "checkpoint.every_steps": 1}
    if pipeline == "streaming":
        changes |= streaming(max_staleness_steps=0)
    whole = tiny_config(tiny_models, tmp_path / "whole", changes)
    broken = tiny_config(tiny_models, tmp_path / "broken", changes)
    run_to_end(whole)
    crashing = Batches(crash_after=crash_after, method="update_replayed")
    with pytest.raises(Stop):
        run(broken, RecordingReporter(), raise_warning, crashing.watch)
    run_to_end(broken)
    assert trained(broken) == trained(whole)
    assert same_result(broken.output_path, whole.output_path)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_rollouts_do_not_begin_before_steps_that_would_make_them_too_old(
    tiny_models: TinyModels, tmp_path: Path, staleness: int
) -> None:
    """Every second step trains on kept rollouts alone, and the engine has all the time it wants."""
    changes = {**REPLAY, **streaming(max_staleness_steps=staleness)}
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    assert run(config, RecordingReporter(), raise_warning, slowed("update_replayed"))
    records = read_jsonl(config.output_path / "ledger.jsonl")
    assert [record["dropped"] for record in records] == [""] * 8
    assert sorted(" ".join(trained(config)).split(), key=int) == [str(n) for n in range(16)]


def test_streaming_without_staleness_replays_as_the_sequential_loop_does(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    changes = {**REPLAY, **ALONE}
    plain = tiny_config(tiny_models, tmp_path / "plain", changes)
    streamed = tiny_config(
        tiny_models, tmp_path / "streamed", {**changes, **streaming(max_staleness_steps=0)}
    )
    run_to_end(plain)
    run_to_end(streamed)
    assert trained(plain) == trained(streamed)
    assert student_bytes(plain.output_path) == student_bytes(streamed.output_path)
