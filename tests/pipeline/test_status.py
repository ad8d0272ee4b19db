"""`qwen3-distill status`: a run as another process sees it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.errors import NonFiniteError, RunFolderError
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.report.status import run_status, status_lines
from tests.pipeline.builders import EVALUATION, call_cli, read_json, run_to_end, tiny_config
from tests.pipeline.test_resume import before_step, crash_at, interrupt_at
from tests.tiny_models import TinyModels


@pytest.fixture
def config(tiny_models: TinyModels, run_dir: Path) -> RunConfig:
    return tiny_config(tiny_models, run_dir, {"steps": 3, "evaluation": EVALUATION})


def text_of(folder: Path) -> str:
    return "\n".join(status_lines(run_status(folder)))


def test_the_teachers_and_a_second_evaluation_do_not_hide_the_students(
    config: RunConfig, run_dir: Path
) -> None:
    run_to_end(config)
    file = run_dir / "evaluations.jsonl"
    student = json.loads(file.read_text().splitlines()[-1])
    assert student["model"] == "student"
    for name in ("student@0", "teacher"):
        file.write_text(file.read_text() + json.dumps(student | {"model": name}) + "\n")
    assert run_status(run_dir)["last_evaluation"] == student
    file.write_text(json.dumps(student | {"model": "teacher"}) + "\n")
    assert run_status(run_dir)["last_evaluation"]["model"] == "teacher"
    file.unlink()
    assert run_status(run_dir)["last_evaluation"] is None


def test_a_running_run_says_what_it_waits_for(config: RunConfig, run_dir: Path) -> None:
    seen: list[dict[str, Any]] = []

    def look() -> None:
        result = call_cli("status", run_dir, "--json")
        assert (result.code, result.err) == (0, "")
        seen.append(json.loads(result.out))

    with before_step(2, look):
        run_to_end(config)
    (status,) = seen
    assert status["state"] == "running"
    assert (status["step"], status["steps"], status["pid"]) == (2, 3, os.getpid())
    assert status["tokens_per_second"] > 0
    assert status["seconds_per_step"] > 0
    assert status["eta_s"] > 0
    assert status["last_evaluation"]["model"] == "student"
    shown = "\n".join(status_lines(status))
    assert f"running (process {os.getpid()} on " in shown
    assert "step 2 of 3" in shown
    assert " ETA " in shown
    assert "evaluation: student at step 2" in shown


def test_the_stages_at_work_are_what_it_waits_for() -> None:
    status = dict.fromkeys(
        ("error", "tokens_per_second", "seconds_per_step", "eta_s", "last_evaluation", "stage_s")
    )
    status |= {"folder": "r", "state": "running", "step": 0, "steps": 9, "pid": 1, "host": "h"}
    status |= {"stage": None, "working": {"generate": 41.0, "train": 0.5}}
    assert status_lines(status)[-1] == "waits for: generate (41.0 s), train (0.50 s)"


def test_a_finished_run(config: RunConfig, run_dir: Path) -> None:
    run_to_end(config)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    status = run_status(run_dir)
    assert (status["state"], status["step"], status["working"]) == ("finished", 3, {})
    assert text_of(run_dir).startswith(f"{run_dir}: finished\nstep 3 of 3")
    assert "ETA" not in text_of(run_dir)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    (run_dir / "status.json").unlink()  # of an earlier version
    assert run_status(run_dir)["state"] == "finished"


def test_a_stopped_run(config: RunConfig, run_dir: Path) -> None:
    interrupt_at(config, 1)
    assert run_status(run_dir)["state"] == "stopped"
    assert "the same command goes on" in text_of(run_dir)
    run_to_end(config)
    assert run_status(run_dir)["state"] == "finished"


def test_a_run_that_was_killed(config: RunConfig, run_dir: Path) -> None:
    crash_at(config, 1)
    beat = read_json(run_dir / "status.json")
    for changes in ({"pid_start": "1"}, {"boot": "another"}):
        (run_dir / "status.json").write_text(json.dumps(beat | {"ended": None} | changes))
        assert run_status(run_dir)["state"] == "ended"
        assert "its process is gone" in text_of(run_dir)


def test_a_run_on_another_machine_is_believed_while_it_is_heard_of(
    config: RunConfig, run_dir: Path
) -> None:
    crash_at(config, 1)
    beat = read_json(run_dir / "status.json") | {"ended": None, "host": "another"}
    (run_dir / "status.json").write_text(json.dumps(beat))
    assert run_status(run_dir, beat["time"] + 20)["state"] == "running"
    assert run_status(run_dir, beat["time"] + 2000)["state"] == "unknown"


def test_a_run_that_failed_says_why(config: RunConfig, run_dir: Path) -> None:
    def fail() -> None:
        raise NonFiniteError("loss is nan")

    with before_step(1, fail), pytest.raises(NonFiniteError):
        run(config, SilentReporter(), lambda message: None)
    assert f"{run_dir}: failed: loss is nan" in text_of(run_dir)


def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, config: RunConfig, run_dir: Path
) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        result = call_cli("status", folder)
        assert result.code == 2
        assert "is not a run folder" in result.err
        assert "Traceback" not in result.err
    run_to_end(config)
    for name in ("metrics.jsonl", "evaluations.jsonl", "status.json"):  # a run that has just begun
        (run_dir / name).unlink()
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "summary.json").unlink()
    assert "unknown\nstep 0 of 3" in text_of(run_dir)


def test_a_config_without_steps_is_no_run_of_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": 0}')
    with pytest.raises(RunFolderError, match="is not a run folder"):
        run_status(tmp_path)
