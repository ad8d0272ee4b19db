"""The offline stages, through files, do exactly what one pipeline step does."""

import re
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.config_io import dump_config
from qwen3_distill.data.rollout_files import read_rollouts, read_scored, write_rollouts
from qwen3_distill.data.tasks import ChainTask
from qwen3_distill.errors import EngineError
from qwen3_distill.pipeline import sequential
from qwen3_distill.types import Rollout
from tests.pipeline.builders import (
    FULL,
    SAMPLED,
    TASK_REWARD,
    TOP_K,
    call_cli,
    refused,
    run_to_end,
    student_bytes,
    tiny_config,
    write_config,
)
from tests.tiny_models import TinyModels, write_model

EVALUATION = (
    "evaluation={prompts: {kind: task, split: eval}, verifier: {kind: task}, num_problems: 2}"
)


class Offline:
    """The three commands over one config, with their files in one folder."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config_file = write_config(folder / "config.yaml", dump_config(config))
        self.rollouts = folder / "rollouts.parquet"
        self.scored = folder / "scored.parquet"
        self.student = folder / "student"

    def generate(self, *options: str) -> None:
        command = ("generate", "--config", self.config_file, "--out", self.rollouts, *options)
        assert call_cli(*command).code == 0

    def score(self) -> None:
        files = ("--rollouts", self.rollouts, "--out", self.scored)
        assert call_cli("score", "--config", self.config_file, *files).code == 0

    def train(self) -> str:
        result = call_cli(*self.train_command)
        assert result.code == 0
        return result.out

    @property
    def train_command(self) -> tuple[str | Path, ...]:
        files = ("--scored", self.scored, "--out", self.student)
        return ("train", "--config", self.config_file, *files)

    @property
    def trained(self) -> bytes:
        return (self.student / "model.safetensors").read_bytes()


def offline(models: TinyModels, folder: Path, changes: dict[str, Any] | None = None) -> Offline:
    config = tiny_config(models, folder / "run", {"steps": 1, **(changes or {})})
    return Offline(config, folder)


def verdict(task: ChainTask, problem: object, response_text: str) -> bool:
    return len(response_text) % 2 == 0


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"objective": SAMPLED}, id="sampled"),
        pytest.param({"objective": TOP_K}, id="top_k"),
        pytest.param({"objective": FULL}, id="full"),
        pytest.param(TASK_REWARD, id="task-reward"),
    ],
)
def test_generate_score_train_equal_one_pipeline_step(
    changes: dict[str, Any],
    tiny_models: TinyModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ChainTask, "check", verdict)
    changes = {"steps": 1, "logging.rollouts_per_save": 99, **changes}
    config = tiny_config(tiny_models, tmp_path / "run", changes)
    run_to_end(config)
    stages = Offline(config, tmp_path / "offline")
    stages.generate()
    stages.score()
    stages.train()
    online = read_scored(tmp_path / "run" / "rollouts" / "step-000000.parquet")
    assert [answer(item.rollout) for _, item in read_scored(stages.scored)] == [
        answer(item.rollout) for _, item in online
    ]
    assert stages.trained == student_bytes(tmp_path / "run")


def answer(rollout: Rollout) -> tuple[str, list[int], list[float]]:
    return (
        rollout.rollout_id,
        rollout.response_ids.tolist(),
        rollout.behavior_logprobs.tolist(),
    )


def test_two_steps_take_two_prompts_each_and_two_updates(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    stages = offline(tiny_models, tmp_path, {"steps": 2})
    stages.generate("--step", "1", "--num-steps", "2")
    rows = read_rollouts(stages.rollouts)
    assert [step for step, _ in rows] == [1] * 4 + [2] * 4
    # The student of the directory samples them all: offline, nothing was trained in between.
    assert {span.version.step for _, rollout in rows for span in rollout.versions} == {0}
    prompts = [rollout.prompt.prompt_id for _, rollout in rows]
    assert len(set(prompts[:4])) == len(set(prompts[4:])) == 2
    stages.score()
    assert "student after 2 steps" in stages.train()
    assert stages.trained != (tiny_models.student / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def ready(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Offline:
    """Rollouts and their scores."""
    stages = offline(tiny_models, tmp_path_factory.mktemp("ready"))
    stages.generate()
    stages.score()
    return stages


def test_scores_of_another_teacher_are_refused(ready: Offline, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other-teacher", seed=7)
    words = ["was scored by teacher#", "the config's teacher is other-teacher#"]
    refused(*ready.train_command, f"scoring.model={other}", words=words)
    assert not ready.student.exists()


def test_scores_without_what_the_objective_needs_are_refused(ready: Offline) -> None:
    refused(*ready.train_command, "objective={kind: top_k, k: 4}", words=["top"])
    assert not ready.student.exists()


def test_directory_with_something_in_it_is_refused(ready: Offline, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("work")
    command = ("train", "--config", ready.config_file, "--scored", ready.scored)
    refused(*command, "--out", tmp_path, words=[str(tmp_path), "not empty"])
    refused(*command, "--out", tmp_path / "precious", words=["precious", "not empty"])
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("stage", ["generate", "score", "train", "eval", "audit-teacher"])
def test_what_could_not_be_written_is_refused_before_the_work(
    ready: Offline, tmp_path: Path, stage: str
) -> None:
    (tmp_path / "file").write_text("work")
    inputs = {
        "score": ("--rollouts", ready.rollouts),
        "train": ("--scored", ready.scored),
        "eval": (EVALUATION,),
        "audit-teacher": ("--rollouts", ready.rollouts, "--num", "2"),
    }
    command = (stage, "--config", ready.config_file, *inputs.get(stage, ()), "--out")
    result = call_cli(*command, tmp_path / "file" / "out")
    assert result.code == 2
    assert re.search(r"file/out\S* could not be written", result.err)
    assert not result.out
    assert call_cli(*command, tmp_path / "new" / "out.parquet").code == 0
    assert (tmp_path / "new" / "out.parquet").exists()


def test_empty_files_are_refused(ready: Offline, tmp_path: Path) -> None:
    empty, out = tmp_path / "empty.parquet", tmp_path / "out"
    write_rollouts(empty, [], str)
    score = ("score", "--config", ready.config_file, "--rollouts", empty, "--out", out)
    refused(*score, words=[str(empty), "no rollouts"])
    train = ("train", "--config", ready.config_file, "--scored", empty, "--out", out)
    refused(*train, words=[str(empty), "scored rollouts"])
    assert not out.exists()


def test_missing_file_is_refused(ready: Offline, tmp_path: Path) -> None:
    command = ("score", "--config", ready.config_file, f"output_dir={tmp_path / 'run'}")
    refused(*command, "--rollouts", tmp_path / "no.parquet", words=["no.parquet", "not exist"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["generate", "score"])
def test_finished_steps_of_a_stage_that_is_broken_off_are_kept(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    files = offline(tiny_models, tmp_path)
    files.generate("--num-steps", "3")
    files.score()
    whole = {"generate": files.rollouts, "score": files.scored}[stage]
    expected = {"generate": read_rollouts, "score": read_scored}[stage](whole)
    whole.unlink()
    real, calls = getattr(sequential, stage), 0

    async def breaks_in_the_third(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise EngineError("broken off by hand")
        return await real(*arguments, **settings)

    monkeypatch.setattr(sequential, stage, breaks_in_the_third)
    options = ("--num-steps", "3") if stage == "generate" else ("--rollouts", files.rollouts)
    command = (stage, "--config", files.config_file, "--out", whole, *options)
    result = call_cli(*command)
    assert result.code == 3
    part = whole.with_name(f"{whole.stem}-partial.parquet")
    assert f"8 rollouts of finished steps are in {part}" in " ".join(result.out.split())
    assert not whole.exists()
    kept = {"generate": read_rollouts, "score": read_scored}[stage](part)
    assert [step for step, _ in kept] == [step for step, _ in expected][:8]
