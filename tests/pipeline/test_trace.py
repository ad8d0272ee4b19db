"""A run's trace, and its MPS daemon."""

import asyncio
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.errors import EngineStartError
from qwen3_distill.hosts.mps import PIPE_VARIABLE, PRIORITY_VARIABLE, MpsDaemon
from qwen3_distill.pipeline import run as run_module
from qwen3_distill.pipeline.assembly.engines import build_engine
from qwen3_distill.pipeline.assembly.plan import plan_memory
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.run import run
from qwen3_distill.pipeline.run_folder import RunFolder
from qwen3_distill.pipeline.summary import summarize
from qwen3_distill.recording.jsonl import OCCASIONAL_STAGES, STEP_STAGES, JsonlLog, read_jsonl
from qwen3_distill.recording.trace import Event, read_trace
from tests.pipeline.builders import (
    EVALUATION,
    RecordingReporter,
    raise_warning,
    read_json,
    run_to_end,
    same_result,
    tiny_config,
)
from tests.tiny_models import TinyModels

ACCURACY = {
    "accuracy": 0.5,
    "ci_low": 0.4,
    "ci_high": 0.6,
    "num_problems": 8,
    "samples_per_problem": 1,
}
MPS = {"pipeline": {"kind": "sequential", "mps": True}}


@pytest.fixture(scope="module")
def finished(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Four steps, a checkpoint every second one, evaluated before and after."""
    changes = {"evaluation": EVALUATION | {"every_steps": 4}}
    config = tiny_config(tiny_models, tmp_path_factory.mktemp("traced") / "run", changes)
    run_to_end(config)
    return config


def begins(events: list[Event]) -> list[tuple[str, str]]:
    """(stage, name) of every span in order."""
    return [(event["cat"], event["name"]) for event in events if event["ph"] == "B"]


def test_the_trace_has_every_stage_of_every_step(finished: RunConfig) -> None:
    events = read_json(finished.output_path / "trace.json")  # with its bracket at the end
    stages = Counter(stage for stage, _ in begins(events))
    assert stages == {
        "generate": 4,
        "score": 4,
        "train": 4,
        "publish": 5,  # the first before any step
        "evaluate": 3,
        "checkpoint": 2,
    }
    assert [name for stage, name in begins(events) if stage in OCCASIONAL_STAGES] == [
        "teacher",
        "student",
        "checkpoint 2",
        "checkpoint 4",
        "student",
    ]
    assert [event["name"] for event in events if event["ph"] == "X"] == [
        f"step {step}" for step in (1, 2, 3, 4)
    ]


def test_the_trace_has_every_weight_version_after_its_publishing(finished: RunConfig) -> None:
    events = read_trace(finished.output_path / "trace.json")
    published = [
        event["ts"] for event in events if event["ph"] == "B" and event["cat"] == "publish"
    ]
    versions = [event for event in events if event["ph"] == "i"]
    assert [event["args"]["step"] for event in versions] == [0, 1, 2, 3, 4]
    assert all(began < version["ts"] for began, version in zip(published, versions, strict=True))


def test_stages_of_a_sequential_step_add_up_to_it(finished: RunConfig) -> None:
    records = read_jsonl(finished.output_path / "metrics.jsonl")
    assert len(records) == finished.steps
    for record in records:
        stages = [record[f"time/{stage}_s"] for stage in (*STEP_STAGES, *OCCASIONAL_STAGES)]
        busy_s = record["time/step_s"] * (1 - record["idle/all_fraction"])
        assert sum(stages) == pytest.approx(busy_s)


def test_a_checkpoint_stands_in_the_step_that_waited_for_it(finished: RunConfig) -> None:
    records = read_jsonl(finished.output_path / "metrics.jsonl")
    assert [record["time/checkpoint_s"] > 0 for record in records] == [False, False, True, False]
    assert all(record["time/evaluate_s"] == 0 for record in records)  # before and after the steps


def test_without_a_trace_the_times_are_kept(tiny_models: TinyModels, run_dir: Path) -> None:
    run_to_end(tiny_config(tiny_models, run_dir, {"logging.trace": False}))
    assert not list(run_dir.glob("trace*"))
    assert all(record["time/train_s"] > 0 for record in read_jsonl(run_dir / "metrics.jsonl"))


def test_a_resumed_run_begins_a_trace_and_keeps_the_earlier_one(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    config = tiny_config(tiny_models, tmp_path / "run")
    monkeypatch.setattr(run_module, "summarize", dies)
    with pytest.raises(KeyboardInterrupt):
        run_to_end(config)
    monkeypatch.undo()
    (tmp_path / "run" / "checkpoints" / "step-000004" / "cursor.json").unlink()
    warnings: list[str] = []
    assert run(config, RecordingReporter(), warnings.append)
    first, second = (read_trace(tmp_path / "run" / name) for name in ("trace-1.json", "trace.json"))
    steps = [[e["args"]["step"] for e in events if e["ph"] == "X"] for events in (first, second)]
    assert steps == [[1, 2, 3, 4], [3, 4]]
    assert "from step 2" in second[0]["args"]["name"]
    reference = tmp_path / "reference"
    run_to_end(tiny_config(tiny_models, reference, {"logging.trace": False}))
    assert same_result(tmp_path / "run", reference)


@pytest.mark.parametrize(
    ("idle", "other"), [(0.1, 7.0), (0.4, 10.0)], ids=["one-after-another", "side-by-side"]
)
def test_the_summary_counts_what_ran_side_by_side_once(
    idle: float, other: float, tiny_models: TinyModels, run_dir: Path
) -> None:
    stages = {"generate": 5.0, "score": 1.0, "train": 3.0, "publish": 0.0}
    times = {f"time/{s}_s": t for s, t in (stages | {"evaluate": 0.0, "checkpoint": 0.0}).items()}
    counts = {"tokens/generated": 1, "tokens/trained": 1}
    with RunFolder(tiny_config(tiny_models, run_dir)) as folder:
        JsonlLog(folder.metrics).log(
            1,
            {"wall_s": 10.0, "time/step_s": 10.0, "idle/all_fraction": idle, **times, **counts},
        )
        JsonlLog(folder.evaluations).log(1, {"model": "student", "wall_s": 4.0} | ACCURACY)
        summary = summarize(folder, total_wall_s=20.0)
    assert summary["wall_s"] == pytest.approx(
        stages | {"checkpoint": 0.0, "evaluate": 4.0, "other": other, "total": 20.0}
    )


# --- MPS ------------------------------------------------------------------------------------------


def test_a_run_without_an_mps_daemon_says_so_and_goes_on(
    tiny_models: TinyModels, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3_distill.hosts.mps.CONTROL", "no-such-program")
    warnings: list[str] = []
    run_to_end(tiny_config(tiny_models, run_dir, MPS), warnings.append)
    (warning,) = warnings
    assert "without MPS: no-such-program is not on the PATH" in warning


def test_mps_runs_from_before_the_engines_until_after_them(
    tiny_models: TinyModels, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    class StandIn(MpsDaemon):
        @property
        def variables(self) -> dict[str, str]:
            return {PIPE_VARIABLE: "/the/pipes"}

        async def start(self) -> None:
            happened.append("start")

        async def stop(self) -> None:
            happened.append("stop")

    close = Parts.close

    async def closed(self: Parts) -> None:
        happened.append("close")
        await close(self)

    def adapt(parts: Parts) -> Parts:
        happened.append(os.environ[PIPE_VARIABLE])
        return parts

    monkeypatch.setattr(Parts, "close", closed)
    monkeypatch.setattr(run_module, "MpsDaemon", StandIn)
    config = tiny_config(tiny_models, run_dir, MPS)
    assert run(config, RecordingReporter(), raise_warning, adapt)
    assert happened == ["start", "/the/pipes", "close", "stop"]
    assert PIPE_VARIABLE not in os.environ


def test_no_daemon_is_started_unless_asked_for(
    tiny_models: TinyModels, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a daemon")

    monkeypatch.setattr(run_module, "MpsDaemon", refuse)
    run_to_end(tiny_config(tiny_models, run_dir))


@pytest.mark.parametrize(
    ("changes", "priority"),
    [
        (MPS, "1"),
        (MPS | {"generation.environment": {PRIORITY_VARIABLE: "0"}}, "0"),
        ({}, "unset"),
    ],
    ids=["mps", "mps, another priority", "without"],
)
def test_decoding_lets_the_other_clients_of_mps_go_first(
    tiny_models: TinyModels,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: Mapping[str, Any],
    priority: str,
) -> None:
    monkeypatch.delenv(PRIORITY_VARIABLE, raising=False)
    told = run_dir.parent / "priority"
    python = run_dir.parent / "python"
    python.write_text(f"#!/bin/sh\nprintf %s ${{{PRIORITY_VARIABLE}-unset}} > '{told}'\nexit 1\n")
    python.chmod(0o755)
    vllm = {"generation": {"kind": "vllm", "python": str(python), "kv_cache_gib": 0.1}}
    config = tiny_config(tiny_models, run_dir, {**vllm, **changes})
    engine = build_engine(config, plan_memory(config))
    with pytest.raises(EngineStartError):
        asyncio.run(engine.start())
    assert told.read_text() == priority
