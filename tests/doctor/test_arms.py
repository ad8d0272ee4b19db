"""The doctor copes with every arm: without a teacher, with its answers, with a file of rollouts."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config.load import check_config
from qwen3_distill.data.rollout_files import read_rollouts, write_rollouts
from qwen3_distill.doctor.diagnosis import Diagnosis
from qwen3_distill.environments import installed
from qwen3_distill.errors import ConfigError
from qwen3_distill.pipeline.assembly import machine_checks
from qwen3_distill.pipeline.finding import Status
from qwen3_distill.pipeline.preflight import check_before_start
from tests.doctor.test_planted_faults import fake_engine
from tests.doctor.worlds import World, by_name, make_world, with_status
from tests.pipeline.builders import call_cli, write_config

OF_SCORES = (
    "scores",
    "scores alone and in a batch",
    "scores of every server",
    "scores at another temperature",
    "teacher has its weights",
)
OF_A_TEACHER = ("teacher files", "score cache", "tokenizer", "vocabulary", "chat template")
STEPS = ("learner against engine", "weights after a step", "rollouts after a step", "engines end")
SFT: dict[str, Any] = {"objective": {"kind": "sft"}, "rollouts": {"source": "teacher"}}
OFFLINE = {"kind": "offline"}


def statuses(diagnosis: Diagnosis, names: tuple[str, ...]) -> set[Status]:
    found = by_name(diagnosis)
    return {found[name].status for name in names}


def grpo(world: World) -> None:
    world.changes |= {
        "objective": {"kind": "grpo"},
        "scoring": None,
        "samples_per_prompt": 4,
        "sampling.max_new_tokens": 80,
    }


def teachers_answers(world: World) -> Path:
    """Write a file of answers that the teacher gave."""
    file = world.folder / "answers.parquet"
    config = write_config(world.folder / "generate.yaml", world.values)
    result = call_cli("generate", "--config", config, "--out", str(file))
    assert result.code == 0, result.err
    return file


def test_a_run_without_a_teacher_passes_and_its_lines_are_skipped(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    grpo(world)
    diagnosis = world.diagnose()
    assert with_status(diagnosis, Status.FAIL, Status.WARN) == []
    assert statuses(diagnosis, (*OF_SCORES, *OF_A_TEACHER)) == {Status.SKIP}
    assert statuses(diagnosis, STEPS) == {Status.PASS}


def test_rewards_that_are_all_equal_warn_and_nothing_is_pushed(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    grpo(world)
    world.changes["sampling.max_new_tokens"] = 2  # too short to answer anything
    diagnosis = world.diagnose()
    assert with_status(diagnosis, Status.FAIL) == []
    learner = by_name(diagnosis)["learner against engine"]
    assert learner.status is Status.WARN
    assert "same reward" in learner.verdict.found
    assert statuses(diagnosis, STEPS[1:3]) == {Status.SKIP}
    assert statuses(diagnosis, STEPS[3:]) == {Status.PASS}


def test_sft_steps_on_the_teachers_answers(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.changes |= SFT
    diagnosis = world.diagnose()
    assert with_status(diagnosis, Status.FAIL, Status.WARN) == []
    assert statuses(diagnosis, ("teacher's answers", *STEPS)) == {Status.PASS}
    assert statuses(diagnosis, OF_SCORES) == {Status.SKIP}
    assert "the teacher's answers" in by_name(diagnosis)[STEPS[0]].verdict.found


def test_a_mixture_is_scored_and_the_teacher_answers_too(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.changes |= {
        "objective": {"kind": "top_k", "k": 4},
        "rollouts": {"source": "mixture", "teacher_share": 0.5, "teacher_temperature": 0.5},
    }
    diagnosis = world.diagnose()
    assert with_status(diagnosis, Status.FAIL, Status.WARN) == []
    assert statuses(diagnosis, ("teacher's answers", "scores", *STEPS)) == {Status.PASS}


def test_rollouts_of_a_file_are_read_before_anything_starts(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.changes |= SFT
    file = teachers_answers(world)
    world.changes |= {
        "rollouts": {"source": "file", "file": str(file)},
        "scoring": None,
        "pipeline": OFFLINE,
    }
    diagnosis = world.diagnose()
    assert with_status(diagnosis, Status.FAIL, Status.WARN) == []
    assert statuses(diagnosis, ("rollouts file", *STEPS)) == {Status.PASS}
    del world.changes["objective"], world.changes["scoring"]  # learns from the student alone
    assert with_status(world.diagnose(), Status.FAIL) == ["rollouts file"]
    write_rollouts(file, list(read_rollouts(file))[:0], lambda ids: "")
    assert with_status(world.diagnose(), Status.FAIL) == ["rollouts file"]
    file.write_text("not Parquet")
    assert with_status(world.diagnose(), Status.FAIL) == ["rollouts file"]
    config = write_config(tmp_path / "run.yaml", world.values)
    result = call_cli("run", "--config", config)
    assert result.code == 2
    assert str(file) in result.err


def test_rollouts_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.changes |= SFT
    file = teachers_answers(world)
    world.changes |= {
        "rollouts": {"source": "file", "file": str(file)},
        "scoring": None,
        "pipeline": OFFLINE,
    }
    (step, first), *others = read_rollouts(file)
    spoiled = first.response_ids.copy()
    spoiled[0] = 50_000
    write_rollouts(file, [(step, replace(first, response_ids=spoiled)), *others], lambda ids: "")
    found = by_name(world.diagnose(engines=False))["rollouts file"]
    assert found.status is Status.FAIL
    assert "50000" in found.verdict.text


def test_engines_that_are_not_installed_fail_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert installed.installed() == []
    world = make_world(tmp_path)
    world.changes["generation"] = {"kind": "vllm", "dtype": "float32"}
    diagnosis = world.diagnose(engines=False)
    assert with_status(diagnosis, Status.FAIL) == ["installed engines"]
    assert "engines install vllm`" in by_name(diagnosis)["installed engines"].verdict.change
    assert statuses(diagnosis, ("driver", "engine versions")) == {Status.SKIP}
    with pytest.raises(ConfigError, match=r"^no environment of vllm"):
        check_before_start(check_config(world.values))


def test_a_run_whose_engines_are_embedded_starts_no_program_to_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []

    def run(command: object, **options: object) -> None:
        started.append(command)
        raise OSError

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(machine_checks, "detect_gpu", lambda: started.append("nvidia-smi"))
    world = make_world(tmp_path)
    assert check_before_start(check_config(world.values)) == []
    assert started == []
    fake_engine(world, versions={"vllm": "0.26.0"})
    (note,) = check_before_start(check_config(world.values))
    assert "does not say what is installed for vllm" in note
    assert started
