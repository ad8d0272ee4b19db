"""A run writes into folders of its own only; what holds files of something else is refused."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_distill.config.load import dump_config
from qwen3_distill.errors import ConfigError, RunFolderError
from qwen3_distill.pipeline.assembly.plan import engine_log
from qwen3_distill.pipeline.offline import offline_file
from qwen3_distill.pipeline.own_folder import (
    refuse_foreign_files_as_output,
    refuse_inputs_as_output,
    require_own_folder,
)
from qwen3_distill.scoring.cache import FILE_NAME, check_cache_folder
from tests.pipeline.builders import EVALUATION, refused, run_to_end, tiny_config, write_config
from tests.tiny_models import TinyModels


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def a_model(folder: Path, models: TinyModels) -> None:
    shutil.copytree(models.student, folder)


def notes(folder: Path, models: TinyModels) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def a_model_named_student(folder: Path, models: TinyModels) -> None:
    shutil.copytree(models.student, folder / "student")


def a_trainers_output(folder: Path, models: TinyModels) -> None:
    shutil.copytree(models.student, folder)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "checkpoints" / "step-1").mkdir(parents=True)


def another_programs_config(folder: Path, models: TinyModels) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"steps": 4, "output_dir": "x"}')


def logs_of_something_else(folder: Path, models: TinyModels) -> None:
    (folder / "logs" / "2024").mkdir(parents=True)
    (folder / "logs" / "2024" / "x.csv").write_text("1")


def damaged_json(folder: Path, models: TinyModels) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{")


OTHERS = [
    a_model,
    notes,
    a_model_named_student,
    a_trainers_output,
    another_programs_config,
    logs_of_something_else,
    damaged_json,
]


@pytest.mark.parametrize("fill", OTHERS)
def test_folder_of_something_else_is_refused_and_keeps_every_byte(
    fill: Callable[[Path, TinyModels], None], tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = tmp_path / "taken"
    fill(folder, tiny_models)
    before = tree(folder)
    config = tiny_config(tiny_models, folder, {"steps": 1})
    file = write_config(tmp_path / "c.yaml", dump_config(config))
    for command in ("run", "generate", "score", "train"):
        refused(command, "--config", file, words=[str(folder), "files of something else"])
    refused("config", "check", "--config", file, words=["something else", "output_dir"])
    with pytest.raises(RunFolderError, match="something else"):
        engine_log(config, "vllm")
    assert tree(folder) == before
    assert not list(folder.rglob(".lock"))


def test_folder_that_is_the_students_or_holds_it_is_refused(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    shutil.copytree(tiny_models.student, tmp_path / "work" / "model")
    model = tmp_path / "work" / "model"
    for output_dir in (model, tmp_path / "work"):
        values = {"student.model": str(model), "steps": 1}
        with pytest.raises(RunFolderError, match="something else"):
            run_to_end(tiny_config(tiny_models, output_dir, values))
    assert tree(model) == tree(tiny_models.student)


def test_input_where_the_student_would_be_written_is_refused(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(dump_config(tiny_config(tiny_models, run))))
    shutil.copytree(tiny_models.student, run / "student")
    for setting in ("student.model", "scoring.model"):
        config = tiny_config(tiny_models, run, {setting: str(run / "student")})
        with pytest.raises(ConfigError, match=setting):
            run_to_end(config)
    assert tree(run / "student") == tree(tiny_models.student)


@pytest.mark.parametrize(
    "names",
    [
        [],
        [".DS_Store", "lost+found"],
        [".lock"],
        [".lock", "logs/vllm.log"],
        ["logs/mps.log", "logs/mps/control.log"],
        ["offline/rollouts.parquet", "offline/rollouts-partial.parquet", "offline/student/x"],
    ],
    ids=str,
)
def test_what_a_run_may_find_in_its_folder(
    names: list[str], tiny_models: TinyModels, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    run_to_end(tiny_config(tiny_models, run, {"steps": 1}))
    (run / "notes.txt").write_text("a user's, in a run folder")
    offline_file(tiny_config(tiny_models, run), "student")
    run_to_end(tiny_config(tiny_models, run, {"steps": 1}))


def test_file_of_the_redirected_output_may_be_in_the_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from qwen3_distill.pipeline.own_folder import require_own_folder\n"
        "require_own_folder(Path(sys.argv[1]))"
    )
    for name in ("log.txt", "errors.txt"):
        with (tmp_path / name).open("w") as file:
            streams = {"stdout": file} if name == "log.txt" else {"stderr": file}
            command = [sys.executable, "-c", program, str(tmp_path)]
            done = subprocess.run(command, **streams, check=False)  # type: ignore[call-overload]
        assert done.returncode == 0
        os.remove(tmp_path / name)
    (tmp_path / "log.txt").touch()
    with pytest.raises(RunFolderError, match=r"log\.txt"):
        require_own_folder(tmp_path)


# --- Outputs of single commands ------------------------------------------------------------------


def test_output_of_a_command_replaces_no_input(tiny_models: TinyModels, tmp_path: Path) -> None:
    rollouts = tmp_path / "r.parquet"
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    model = tmp_path / "model"
    shutil.copytree(tiny_models.student, model)
    values = {
        "student.model": str(model),
        "prompts": {"kind": "jsonl", "path": str(prompts)},
        "evaluation": EVALUATION,
    }
    config = write_config(
        tmp_path / "c.yaml", dump_config(tiny_config(tiny_models, tmp_path / "run", values))
    )
    before = tree(tmp_path)
    words = ["would replace", "--out"]
    refused("generate", "--config", config, "--out", prompts, words=[*words, "prompts.path"])
    target = model / "model.safetensors"
    refused("generate", "--config", config, "--out", target, words=[*words, "student.model"])
    refused(
        *("score", "--config", config, "--rollouts", rollouts, "--out", rollouts),
        words=[*words, "--rollouts"],
    )
    for command in ("eval", "audit-teacher"):
        target = model / "config.json"
        refused(command, "--config", config, "--out", target, words=[*words, "student.model"])
    assert tree(tmp_path) == before


def test_output_of_a_command_replaces_no_file_of_another_model_or_run(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", {"steps": 1, "evaluation": EVALUATION})
    run_to_end(config)
    model = tmp_path / "other"
    shutil.copytree(tiny_models.teacher, model)
    file = write_config(tmp_path / "c.yaml", dump_config(config))
    before = tree(tmp_path)
    for target, words in (
        (model / "model.safetensors", "a file of a model"),
        (tmp_path / "run" / "metrics.jsonl", "a run's records"),
        (tmp_path / "run" / "student" / "config.json", "a file of a model"),
    ):
        refused("generate", "--config", file, "--out", target, words=["would replace", words])
        refused("eval", "--config", file, "--out", target, words=["would replace", words])
        refused("report", tmp_path / "run", "--out", target, words=["would replace", words])
    assert tree(tmp_path) == before
    refuse_foreign_files_as_output(tmp_path / "run" / "report.html")
    refuse_foreign_files_as_output(model / "accuracy.json")


def test_output_beside_the_files_of_a_model_is_allowed(tmp_path: Path) -> None:
    inputs = {"--model": tmp_path}
    refuse_inputs_as_output(tmp_path / "accuracy.json", inputs)
    refuse_inputs_as_output(tmp_path / "sub" / "config.json", inputs)
    (tmp_path / "link").symlink_to(tmp_path / "tokenizer.json")
    for name in ("link", "config.json", "model-00001-of-2.safetensors", "vocab.json"):
        with pytest.raises(ConfigError, match="--model"):
            refuse_inputs_as_output(tmp_path / name, inputs)


def test_cache_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    check_cache_folder(tmp_path / "new")
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / ".DS_Store").touch()
    check_cache_folder(folder)
    (folder / "model.safetensors").touch()
    with pytest.raises(RunFolderError, match=r"something else \(model.safetensors\)"):
        check_cache_folder(folder)
    for table, is_ours in (("mine", False), ("scores", True)):
        with sqlite3.connect(folder / FILE_NAME) as database:
            database.execute(f"CREATE TABLE {table} (x INTEGER)")
        database.close()
        if is_ours:
            check_cache_folder(folder)
        else:
            with pytest.raises(RunFolderError, match=r"something else \(mine\)"):
                check_cache_folder(folder)
