"""A run folder answers from any working directory, and without the models it was made from."""

import json
import shutil
from pathlib import Path

import pytest

from qwen3_distill.config.load import load_config
from qwen3_distill.data.rollout_files import read_scored
from qwen3_distill.pipeline.summary import find_text_tools
from tests.pipeline.builders import (
    EVALUATION,
    call_cli,
    read_json,
    refused,
    timeless,
    tiny_values,
    write_config,
)
from tests.tiny_models import TinyModels, write_model

RUN = Path("work") / "runs" / "a"


@pytest.fixture(scope="module")
def template(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a finished run whose config has relative paths only."""
    root = tmp_path_factory.mktemp("moved")
    work = root / "work"
    shutil.copytree(tiny_models.student, work / "models" / "student")
    shutil.copytree(tiny_models.teacher, work / "models" / "teacher")
    rows = [json.dumps({"prompt": f"what is {n}?", "answer": str(n)}) for n in range(5)]
    (work / "prompts.jsonl").write_text("\n".join(rows))
    (work / "judge.py").write_text(
        "def judge(row, response):\n    return row['answer'] in response\n"
    )
    prompts = {"kind": "jsonl", "path": "prompts.jsonl", "answer_field": "answer"}
    changes = {
        "steps": 2,
        "student.model": "models/student",
        "scoring.model": "models/teacher",
        "prompts": prompts,
        "verifier": {"kind": "python", "function": "judge.py:judge"},
        "evaluation": EVALUATION | {"prompts": prompts, "verifier": {"kind": "math"}},
        "checkpoint": {"every_steps": 1},
    }
    write_config(work / "c.yaml", tiny_values(tiny_models, Path("runs/a"), changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        assert call_cli("run", "--config", "c.yaml").code == 0
    return root


@pytest.fixture
def elsewhere(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run's folder, its recorded working directory included; we are not in it."""
    root = tmp_path / "copy"
    shutil.copytree(template, root)
    manifest = root / RUN / "manifest.json"
    values = read_json(manifest)
    values["starts"][-1]["working_directory"] = str(root / "work")
    manifest.write_text(json.dumps(values))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return root


def body(page: Path) -> str:
    return page.read_text()


def test_report_is_the_same_from_anywhere_and_without_the_models(
    elsewhere: Path, template: Path
) -> None:
    expected = body(template / RUN / "report.html").replace(str(template), str(elsewhere))
    for _ in range(2):
        assert call_cli("report", elsewhere / RUN).code == 0
        assert body(elsewhere / RUN / "report.html") == expected
        shutil.rmtree(elsewhere / "work" / "models", ignore_errors=True)


def test_report_without_any_tokenizer_shows_ids_and_says_so(elsewhere: Path) -> None:
    shutil.rmtree(elsewhere / "work" / "models")
    shutil.rmtree(elsewhere / RUN / "student")
    result = call_cli("report", elsewhere / RUN)
    assert result.code == 0
    assert "tokens are shown as their ids" in result.err
    ((_, scored), *_) = read_scored(elsewhere / RUN / "rollouts" / "step-000000.parquet")
    page = body(elsewhere / RUN / "report.html")
    assert "token ids, without a tokenizer: " in page
    assert f">{scored.rollout.response_ids[0]} <" in page


def test_tokenizer_of_another_model_in_the_students_place_is_not_used(elsewhere: Path) -> None:
    shutil.rmtree(elsewhere / RUN / "student")
    config = load_config(elsewhere / RUN / "config.json")
    found = find_text_tools(elsewhere / RUN, config)
    assert found is not None
    assert found.student_dir == str(elsewhere / "work" / "models" / "student")
    file = elsewhere / "work" / "models" / "student" / "tokenizer.json"
    values = read_json(file)
    first, second = list(values["model"]["vocab"])[:2]
    vocabulary = values["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(values))
    assert find_text_tools(elsewhere / RUN, config) is None


@pytest.mark.parametrize("gone", [False, True], ids=["elsewhere", "without the student"])
def test_eval_measures_as_the_run_did(elsewhere: Path, tmp_path: Path, gone: bool) -> None:
    if gone:
        shutil.rmtree(elsewhere / "work" / "models" / "student")
    config, out = elsewhere / RUN / "config.json", tmp_path / "result.json"
    student = elsewhere / RUN / "student"
    result = call_cli("eval", "--config", config, "--model", student, "--out", out)
    assert result.code == 0, result.err
    assert ("is gone" in result.out) == gone
    last = timeless(elsewhere / RUN / "evaluations.jsonl")[-1]
    assert read_json(out) | {"step": 2, "model": "student"} == last


def test_eval_of_a_strange_model_is_refused_without_the_student_too(
    elsewhere: Path, tmp_path: Path
) -> None:
    shutil.rmtree(elsewhere / "work" / "models" / "student")
    other = write_model(tmp_path / "other", seed=1, vocab_size=300)
    config = elsewhere / RUN / "config.json"
    refused("eval", "--config", config, "--model", other, words=["do not match", "vocab_size"])


def test_run_goes_on_from_elsewhere_and_after_its_folder_was_moved(elsewhere: Path) -> None:
    moved = elsewhere / "moved"
    (elsewhere / RUN).rename(moved)
    for name in ("summary.json", "report.html"):
        (moved / name).unlink()
    shutil.rmtree(moved / "student")
    shutil.rmtree(moved / "checkpoints" / "step-000002")
    result = call_cli("run", "--config", moved / "config.json")
    assert result.code == 0, result.err
    assert read_json(moved / "summary.json")["steps"] == 2
    assert [start["step"] for start in read_json(moved / "manifest.json")["starts"]] == [0, 1]
    assert not Path("runs").exists()
    assert not (elsewhere / RUN).exists()


def test_paths_that_lead_somewhere_from_here_are_kept(elsewhere: Path) -> None:
    file = elsewhere / RUN / "config.json"
    assert load_config(file).student.model == str(elsewhere / "work" / "models" / "student")
    Path("models/student").mkdir(parents=True)
    assert load_config(file).student.model == "models/student"
    assert load_config(file, ["student.model=x"]).student.model == "x"
    copy = elsewhere / "config.yaml"  # no run folder's
    shutil.copy(file, copy)
    assert load_config(copy).teacher.model == "models/teacher"
