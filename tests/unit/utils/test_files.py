import json
import math
import os
from pathlib import Path

import pytest

from qwen3_distill.errors import DataError, RunFolderError
from qwen3_distill.utils.files import atomic_path, write_json_atomic


def write_half(target: Path, error: Exception | None) -> None:
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        if error is not None:
            raise error


def test_block_writes_beside_the_target_and_the_target_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "weights.npy"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".npy"
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["weights.npy"]


def test_failing_block_keeps_the_old_content_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "state"
    target.write_bytes(b"old")
    with pytest.raises(KeyError, match="crash"):
        write_half(target, KeyError("crash"))
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_file_is_synced_before_the_rename_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        events.append(kind)
        real_fsync(descriptor)

    def replace(source: Path, destination: Path) -> None:
        events.append("rename")
        real_replace(source, destination)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_bytes(b"x")
    assert events == ["file", "rename", "folder"]


def test_operating_system_errors_name_the_target(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"cannot write .*/missing/a: .*No such file"):
        write_half(tmp_path / "missing" / "a", None)
    with pytest.raises(RunFolderError, match=r"cannot write .*/a: .*No space left"):
        write_half(tmp_path / "a", OSError(28, "No space left on device"))
    with pytest.raises(RunFolderError, match=r"cannot write .*/a: "), atomic_path(tmp_path / "a"):
        pass  # nothing was written
    assert os.listdir(tmp_path) == []


def test_errors_of_this_package_pass_through(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mine"), atomic_path(tmp_path / "a"):
        raise DataError("mine")


def test_json_round_trip(tmp_path: Path) -> None:
    obj = {"b": [1, 2.5, None], "a": "Größe"}
    write_json_atomic(tmp_path / "x.json", obj)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == obj
    assert "Größe" in text
    assert list(json.loads(text)) == ["b", "a"]


def test_json_refuses_nan_before_it_touches_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(tmp_path / "x.json", {"loss": math.nan})
    assert os.listdir(tmp_path) == []
