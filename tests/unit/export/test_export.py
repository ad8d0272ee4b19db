"""The export command: what it writes, what it refuses, and what it leaves alone."""

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_distill.errors import RunFolderError
from qwen3_distill.export import export as module
from qwen3_distill.export.target import RECORD, written_whole
from tests.unit.export.support import call_export, contents, copy_of, refused


def test_hf_is_the_runs_student_with_a_card(full_run: Path, tmp_path: Path) -> None:
    before = contents(full_run)
    out = tmp_path / "deep" / "out"
    said = call_export(full_run, "--to", "hf", "--out", out)
    assert f"exported to {out}" in said
    student = full_run / "student"
    names = {path.name for path in student.iterdir()}
    assert {path.name for path in out.iterdir()} == {*names, "README.md", RECORD}
    for name in names:
        assert (out / name).read_bytes() == (student / name).read_bytes()
    assert contents(full_run) == before


def test_the_default_folder_is_next_to_the_run(full_run: Path, tmp_path: Path) -> None:
    run = copy_of(full_run, tmp_path / "mine")
    call_export(run, "--to", "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine-hf"]


def test_an_earlier_export_is_replaced_and_nothing_else_is(full_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is nobody's
    call_export(full_run, "--to", "hf", "--out", out)
    (out / "README.md").write_text("edited")
    call_export(full_run, "--to", "hf", "--out", out)
    assert (out / "README.md").read_text() != "edited"
    (out / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    refused(full_run, "--to", "hf", "--out", out, words=("has content", "notes.txt", "--out"))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "record", [None, "{", "[]", '{"made_by": "another tool", "files": ["model.safetensors"]}']
)
def test_a_folder_of_somebody_else_is_left_alone(
    full_run: Path, tmp_path: Path, record: str | None
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"weights")
    if record is not None:
        (out / RECORD).write_text(record)
    before = contents(tmp_path)
    refused(full_run, "--to", "hf", "--out", out, words=("has content", RECORD))
    assert contents(tmp_path) == before


def test_a_file_or_a_dangling_link_in_the_way_is_refused(full_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(full_run, "--to", "hf", "--out", tmp_path / "file", words=("not a folder",))
    assert (tmp_path / "file").read_text() == "mine"
    refused(full_run, "--to", "hf", "--out", tmp_path / "file" / "x", words=("cannot write",))


def test_an_export_never_overlaps_the_run_or_its_models(full_run: Path) -> None:
    before = contents(full_run.parent)
    student = json.loads((full_run / "config.json").read_text())["student"]["model"]
    for out in (full_run, full_run / "export", full_run.parent, Path(student), Path(student) / "x"):
        refused(full_run, "--to", "hf", "--out", out, words=("overlap", "--out"))
    assert contents(full_run.parent) == before


def test_what_is_not_a_finished_run_is_refused_with_what_to_do(
    full_run: Path, tmp_path: Path
) -> None:
    refused(tmp_path / "none", "--to", "hf", words=("not a run folder", "output_dir"))
    run = copy_of(full_run, tmp_path / "run")
    (run / "summary.json").unlink()
    shutil.rmtree(run / "student")
    refused(
        run,
        *("--to", "hf"),
        words=("2 of 2 steps", "qwen3-distill run --config", str(run / "config.json")),
    )
    shutil.copy(full_run / "summary.json", run / "summary.json")
    refused(run, "--to", "hf", words=("student/ is gone", "summary.json"))
    shutil.copytree(full_run / "student", run / "student")
    (run / "student" / "model.safetensors").unlink()
    refused(run, "--to", "hf", words=("safetensors",))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_record_is_named(full_run: Path, tmp_path: Path) -> None:
    run = copy_of(full_run, tmp_path / "run")
    (run / "manifest.json").write_text("{")
    refused(run, "--to", "hf", words=("manifest.json", "restore"))


def test_a_run_that_goes_on_is_refused(full_run: Path, tmp_path: Path) -> None:
    run = copy_of(full_run, tmp_path / "run")
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(run, "--to", "hf", words=("in use",))


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_and_the_old_export(
    full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    out = tmp_path / "out"
    call_export(full_run, "--to", "hf", "--out", out)
    before = contents(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(module, "write_card", fail)
    with pytest.raises((RunFolderError, KeyboardInterrupt)) as caught:
        module.export_run(module.ExportRequest(run=full_run, to="hf", out=out), print)
    if isinstance(caught.value, RunFolderError):
        assert "No space left" in str(caught.value)
    assert contents(tmp_path) == before


def test_the_old_export_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename = Path.rename

    def fails_for_the_new_one(self: Path, target: Path) -> Path:
        if self.name.startswith(".unfinished-"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with (
        pytest.raises(RunFolderError, match="Input/output error"),
        written_whole(out, {}) as folder,
    ):
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_the_command_needs_no_torch_to_say_what_it_can() -> None:
    code = "import sys, qwen3_distill.cli.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
