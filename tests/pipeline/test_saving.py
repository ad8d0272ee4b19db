"""Every failure of an input comes before the training; after a full disk a run goes on."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.modeling import student_directory
from tests.pipeline.builders import (
    call_cli,
    refused,
    same_result,
    student_bytes,
    tiny_values,
    write_config,
)
from tests.tiny_models import TinyModels


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        file = model / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def damaged(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text("{")


OF_BOTH: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "generation config": (damaged("generation_config.json"), ["generation_config.json", "JSON"]),
    "tokenizer": (damaged("tokenizer.json"), ["tokenizer"]),
    "tokenizer config": (damaged("tokenizer_config.json"), ["tokenizer"]),
    "config's types": (edited("config.json", vocab_size="many"), ["config.json cannot be read"]),
    "end of sequence": (
        edited("generation_config.json", eos_token_id="x"),
        ["eos_token_id is 'x'"],
    ),
    "two readings": (edited("config.json", rope_theta=7.0), ["rope_theta is 7.0", "one reader"]),
}
OF_THE_STUDENT: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "special tokens": (damaged("special_tokens_map.json"), ["special_tokens_map.json", "JSON"]),
    "weights": (lambda m: os.truncate(m / "model.safetensors", 99), ["half a download"]),
    "quantized": (
        edited("config.json", quantization_config={"quant_method": "fp8"}),
        ["quantized", "unquantized directory"],
    ),
}


@pytest.mark.parametrize(
    ("who", "damage", "words"),
    [("student.model", *case) for case in (OF_BOTH | OF_THE_STUDENT).values()]
    + [("scoring.model", *case) for case in OF_BOTH.values()],
    ids=[f"student-{name}" for name in OF_BOTH | OF_THE_STUDENT]
    + [f"teacher-{name}" for name in OF_BOTH],
)
def test_damaged_model_files_are_met_before_the_run(
    who: str,
    damage: Callable[[Path], object],
    words: list[str],
    tiny_models: TinyModels,
    tmp_path: Path,
) -> None:
    role = "student" if who == "student.model" else "teacher"
    model = Path(shutil.copytree(getattr(tiny_models, role), tmp_path / "model"))
    damage(model)
    values = tiny_values(tiny_models, tmp_path / "run", {who: str(model)})
    config = write_config(tmp_path / "c.yaml", values)
    for command in (("config", "check"), ("run",)):
        refused(*command, "--config", config, words=[str(model), *words])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("own_process", [False, True], ids=["here", "own-process"])
def test_a_student_that_could_not_be_saved_is_saved_without_training_again(
    own_process: bool, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"training.own_process": True} if own_process else {}
    values = tiny_values(tiny_models, tmp_path / "run", changes)
    config = write_config(tmp_path / "c.yaml", values)
    assert call_cli("run", "--config", config, f"output_dir={tmp_path / 'whole'}").code == 0

    in_the_way = tmp_path / "run" / ".unfinished-student"
    if own_process:
        assert call_cli("run", "--config", config).code == 0  # the folder is the run's
        (tmp_path / "run" / "summary.json").unlink()
        in_the_way.write_text("")
        reason = "File exists"
    else:
        reason = fill_the_disk(monkeypatch)
    words = [f"cannot write {tmp_path / 'run' / 'student'}", reason, "start the same command"]
    refused("run", "--config", config, words=words)
    trained = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert not (tmp_path / "run" / "summary.json").exists()

    monkeypatch.undo()
    in_the_way.unlink(missing_ok=True)
    result = call_cli("run", "--config", config)
    assert result.code == 0, result.err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == trained
    assert same_result(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "run").glob(".unfinished*"))


def test_a_file_in_the_students_place_is_met_before_the_run(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_values(tiny_models, tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "student").write_text("mine")
    words = ["holds files of something else (student)", "output_dir"]
    refused("run", "--config", config, words=words)
    assert (tmp_path / "run" / "student").read_text() == "mine"


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, *, but: Path | None = None) -> str:
    """Let no weights be written, except below ``but``; return what the error says."""
    real: Any = student_directory.save_torch_state_dict

    def save(weights: Any, directory: Path, **options: Any) -> None:
        if but is None or but not in directory.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(weights, directory, **options)

    monkeypatch.setattr(student_directory, "save_torch_state_dict", save)
    return "No space left"


def test_an_offline_student_that_cannot_be_written_is_put_elsewhere(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(
        tmp_path / "c.yaml", tiny_values(tiny_models, tmp_path / "run", {"prompts_per_step": 2})
    )
    files = {name: tmp_path / f"{name}.parquet" for name in ("rollouts", "scored")}
    generate = ("generate", "--config", config, "--out", files["rollouts"], "--num-steps", "1")
    assert call_cli(*generate).code == 0
    score = ("score", "--config", config, "--rollouts", files["rollouts"], "--out", files["scored"])
    assert call_cli(*score).code == 0
    train = ("train", "--config", config, "--scored", files["scored"], "--out")
    assert call_cli(*train, tmp_path / "good" / "student").code == 0

    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    fill_the_disk(monkeypatch, but=spare)
    result = call_cli(*train, tmp_path / "full" / "student")
    assert result.code == 2
    assert f"cannot write {tmp_path / 'full' / 'student'}: " in result.err
    assert f"the student after 1 steps is in {spare / 'student'}" in result.out
    assert student_bytes(spare) == student_bytes(tmp_path / "good")
    assert not (tmp_path / "full" / "student").exists()


def test_a_trained_student_keeps_its_sources_files(tiny_models: TinyModels, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_models.student, tmp_path / "model"))
    edited("generation_config.json", do_sample=False, temperature=0.6, top_k=20)(model)
    edited("tokenizer_config.json", nobody_knows=[1], tokenizer_class="PreTrainedTokenizerFast")(
        model
    )
    (model / "LICENSE").write_text("as is")
    values = tiny_values(tiny_models, tmp_path / "run", {"student.model": str(model), "steps": 1})
    assert call_cli("run", "--config", write_config(tmp_path / "c.yaml", values)).code == 0
    student = tmp_path / "run" / "student"
    same = {path.name for path in model.iterdir()} - {"config.json", "model.safetensors"}
    assert "LICENSE" in same
    assert {p.name for p in student.iterdir()} == same | {"config.json", "model.safetensors"}
    assert all((student / name).read_bytes() == (model / name).read_bytes() for name in same)
