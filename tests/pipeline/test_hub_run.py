"""A run whose models are named by hub id, against a stand-in of the hub."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config.load import check_config, load_config
from qwen3_distill.pipeline.models import localize
from tests.hub_stand_in import HubStandIn, running_hub, use_hub
from tests.pipeline.builders import (
    EVALUATION,
    RecordingReporter,
    call_cli,
    raise_warning,
    run_to_end,
    tiny_values,
    write_config,
)
from tests.tiny_models import TinyModels, write_model

STUDENT, TEACHER = "lab/student", "lab/teacher"


@pytest.fixture
def hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_models: TinyModels
) -> Iterator[HubStandIn]:
    """The stand-in, with both tiny models; the working directory is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with running_hub() as server:
        use_hub(monkeypatch, server.url, tmp_path / "cache")
        server.add(STUDENT, tiny_models.student)
        server.add(TEACHER, tiny_models.teacher)
        yield server


def values_by_id(models: TinyModels, run: Path, **changes: Any) -> dict[str, Any]:
    by_id = {"student.model": STUDENT, "scoring.model": f"{TEACHER}@main"}
    return tiny_values(models, run, by_id | changes)


def test_run_from_hub_ids_is_the_run_from_directories(
    hub: HubStandIn, tiny_models: TinyModels, tmp_path: Path
) -> None:
    changes = {"evaluation": EVALUATION}
    run_to_end(check_config(tiny_values(tiny_models, tmp_path / "local", changes)))
    assert hub.requests == []
    reporter = run_to_end(check_config(values_by_id(tiny_models, tmp_path / "run", **changes)))
    assert any(stage.startswith("downloading lab/student") for stage in reporter.stages)
    losses = [
        [json.loads(line)["loss/objective"] for line in file.read_text().splitlines()]
        for name in ("local", "run")
        if (file := tmp_path / name / "metrics.jsonl")
    ]
    assert losses[0] == losses[1]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["student"]["model"] == STUDENT
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    commits = {repo: known.branches["main"] for repo, known in hub.repositories.items()}
    assert manifest["starts"][-1]["hub"] == {
        "student": {"repo": STUDENT, "revision": "main", "commit": commits[STUDENT]},
        "teacher": {"repo": TEACHER, "revision": "main", "commit": commits[TEACHER]},
    }
    assert manifest["teacher"]["id"].startswith(f"{TEACHER}@{commits[TEACHER][:12]}#")
    shutil.rmtree(tmp_path / "cache")
    result = call_cli("report", tmp_path / "run")
    assert result.code == 0, result.err


def test_resume_keeps_the_commit_when_the_branch_moves(
    hub: HubStandIn, tiny_models: TinyModels, tmp_path: Path
) -> None:
    started = hub.repositories[STUDENT].branches["main"]
    values = values_by_id(tiny_models, tmp_path / "run")
    run_to_end(check_config(values))
    run = tmp_path / "run"
    (run / "summary.json").unlink()
    shutil.rmtree(run / "student")
    shutil.rmtree(run / "checkpoints" / "step-00000004", ignore_errors=True)
    moved = hub.add(STUDENT, write_model(tmp_path / "other", seed=9, tie_word_embeddings=True))
    warned: list[str] = []
    run_to_end(check_config(values), warn=warned.append)
    assert len(warned) == 1
    assert moved[:12] in warned[0]
    assert started[:12] in warned[0]
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert [start["hub"]["student"]["commit"] for start in starts] == [started, started]


def test_config_check_and_plan_download_no_weights(
    hub: HubStandIn, tiny_models: TinyModels, tmp_path: Path
) -> None:
    file = write_config(tmp_path / "c.yaml", values_by_id(tiny_models, tmp_path / "run"))
    result = call_cli("config", "check", "--config", file)
    assert result.code == 0, result.err
    result = call_cli("plan", "--config", file, "--device-memory-gib", "8")
    assert result.code == 0, result.err
    assert "config.json" in hub.downloads()
    assert "model.safetensors" not in hub.downloads()
    assert not (tmp_path / "run").exists()


def test_models_that_do_not_match_are_refused_before_weights(
    hub: HubStandIn, tiny_models: TinyModels, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_models.teacher, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 999}))
    hub.add(TEACHER, other)
    file = write_config(tmp_path / "c.yaml", values_by_id(tiny_models, tmp_path / "run"))
    result = call_cli("run", "--config", file)
    assert result.code == 2
    assert "vocab" in result.err
    assert "model.safetensors" not in hub.downloads()


def test_offline_stages_and_eval_take_hub_ids(
    hub: HubStandIn, tiny_models: TinyModels, tmp_path: Path
) -> None:
    values = values_by_id(tiny_models, tmp_path / "run", evaluation=EVALUATION)
    file = write_config(tmp_path / "c.yaml", values)
    for command in ("generate", "score", "train"):
        result = call_cli(command, "--config", file)
        assert result.code == 0, result.err
    for options in ([], ["--model", TEACHER], ["--model", f"{STUDENT}@main"]):
        result = call_cli("eval", "--config", file, *options)
        assert result.code == 0, result.err
    result = call_cli(
        "audit-teacher", "--config", file, "--num", "2", "--unquantized", f"{TEACHER}@main"
    )
    assert result.code == 0, result.err


@pytest.mark.parametrize("command", ["run", "eval", "audit-teacher", "config check", "plan"])
def test_unknown_id_is_one_line_and_writes_nothing_else(
    hub: HubStandIn, tiny_models: TinyModels, tmp_path: Path, command: str
) -> None:
    changes = {"evaluation": EVALUATION, "scoring.model": "lab/nothing"}
    file = write_config(tmp_path / "c.yaml", values_by_id(tiny_models, tmp_path / "run", **changes))
    result = call_cli(*command.split(), "--config", file)
    assert result.code == 2
    assert "scoring.model=lab/nothing is no directory here" in result.err
    assert "no model repository of that name" in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_environment_variables_of_the_hub_are_honoured(
    hub: HubStandIn, tiny_models: TinyModels, tmp_path: Path
) -> None:
    file = write_config(tmp_path / "c.yaml", values_by_id(tiny_models, tmp_path / "run"))
    command = [sys.executable, "-m", "qwen3_distill.cli.main", "config", "check", "-c", str(file)]

    def check(**variables: str) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        return subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, check=False
        )

    done = check(HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set" in done.stderr
    done = check()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "home" / "hub" / "models--lab--student").is_dir()
    done = check(HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "from the cache is used" in done.stderr


def test_reporter_is_told_of_a_local_directory(
    hub: HubStandIn, tiny_models: TinyModels, tmp_path: Path
) -> None:
    shutil.copytree(tiny_models.student, STUDENT)
    reporter = RecordingReporter()
    config = check_config(values_by_id(tiny_models, tmp_path / "run"))
    local = localize(config, say=reporter.stage, warn=raise_warning)
    assert local.config.student.model == STUDENT
    assert list(local.hub) == ["teacher"]
    assert "the local directory" in reporter.stages[0]


def test_a_finished_run_is_reported_and_evaluated_without_the_hub(
    hub: HubStandIn, tiny_models: TinyModels, tmp_path: Path
) -> None:
    values = values_by_id(tiny_models, tmp_path / "run", evaluation=EVALUATION)
    run_to_end(check_config(values))
    config = tmp_path / "run" / "config.json"
    moved = hub.add(STUDENT, write_model(tmp_path / "other", seed=9, tie_word_embeddings=True))
    result = call_cli("eval", "--config", config)
    assert result.code == 0, result.err
    assert f"is at commit {moved[:12]} now; the run goes on with" in result.out
    shutil.rmtree(tmp_path / "cache")
    hub.status = 503
    asked = len(hub.requests)
    assert call_cli("report", tmp_path / "run").code == 0
    assert len(hub.requests) == asked
    student = tmp_path / "run" / "student"
    result = call_cli("eval", "--config", config, "--model", student)
    assert result.code == 0, result.err
    assert f"student.model={STUDENT} is gone" in result.out
    shutil.rmtree(student)
    result = call_cli("report", tmp_path / "run")
    assert result.code == 0, result.err
    assert "tokens are shown as their ids" in result.err


def test_an_id_that_the_run_found_on_the_hub_becomes_no_path(
    hub: HubStandIn, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_to_end(check_config(values_by_id(tiny_models, tmp_path / "run")))
    shutil.copytree(tiny_models.student, STUDENT)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run" / "config.json"
    assert load_config(file).student.model == STUDENT
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    del manifest["starts"][-1]["hub"]["student"]  # it was a directory
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    assert load_config(file).student.model == str(tmp_path / "work" / STUDENT)


def test_a_path_that_begins_with_a_dot_is_no_id(
    hub: HubStandIn, tiny_models: TinyModels, tmp_path: Path
) -> None:
    values = values_by_id(tiny_models, tmp_path / "run", evaluation=EVALUATION)
    file = write_config(tmp_path / "c.yaml", values)
    for model, words in (
        (f"./{STUDENT}", f"model directory {STUDENT} does not exist"),
        ("hf://lab/student", "is a URL"),
    ):
        result = call_cli("eval", "--config", file, "--model", model)
        assert result.code == 2
        assert words in result.err


def test_what_can_be_refused_is_refused_before_weights(
    hub: HubStandIn, tiny_models: TinyModels, tmp_path: Path
) -> None:
    values = values_by_id(tiny_models, tmp_path / "run", evaluation=EVALUATION)
    file = write_config(tmp_path / "c.yaml", values)
    (folder := tmp_path / "folder").mkdir()
    for command in ("generate", "eval", "audit-teacher"):
        result = call_cli(command, "--config", file, "--out", folder)
        assert result.code == 2, result.out
        assert "is a folder" in result.err
    broken = shutil.copytree(tiny_models.student, tmp_path / "broken")
    (broken / "generation_config.json").write_text("[]")
    hub.add(STUDENT, broken)
    result = call_cli("run", "--config", file)
    assert result.code == 2
    assert "generation_config.json" in result.err
    assert "model.safetensors" not in hub.downloads()
