import errno
import json
import math
import os
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwen3_distill.errors import DataError, RunFolderError
from qwen3_distill.utils.files import atomic_path, check_writable, content_of, write_json_atomic


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


# --- What is replaced, and what is written to ----------------------------------------------------


def save(target: Path, content: bytes = b"new") -> None:
    check_writable(target)
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


@pytest.mark.parametrize("exists", [True, False], ids=["target", "dangling"])
def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "real").mkdir()
    real, first, second = tmp_path / "real" / "x.json", tmp_path / "a.json", tmp_path / "b.json"
    if exists:
        real.write_bytes(b"old")
    first.symlink_to("real/x.json")
    second.symlink_to(first)
    save(second)
    assert real.read_bytes() == b"new"
    assert not real.is_symlink()
    assert (os.readlink(first), os.readlink(second)) == ("real/x.json", str(first))
    assert os.listdir(tmp_path / "real") == ["x.json"]


def test_a_link_into_a_missing_folder_is_refused_and_the_folder_not_made(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "unmounted" / "x")
    with pytest.raises(RunFolderError, match="could not be written"):
        check_writable(link)
    assert os.listdir(tmp_path) == ["link"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")
    target.chmod(mode)
    save(target)
    assert (target.read_bytes(), stat.S_IMODE(target.stat().st_mode)) == (b"new", mode)


def test_a_pipe_gets_the_whole_content_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(pipe.read_bytes)
        save(pipe, b"x" * 200_000)
        assert read.result(timeout=10) == b"x" * 200_000
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_device_is_written_to_and_stays_a_device(tmp_path: Path) -> None:
    before = os.stat("/dev/null")
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    for target in (Path("/dev/null"), link):
        save(target)
    after = os.stat("/dev/null")
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert link.is_symlink()
    assert not any(name.startswith(".tmp-") for name in os.listdir("/dev"))


def test_standard_output_is_written_to_where_it_stands(tmp_path: Path) -> None:
    program = (
        "import sys; from qwen3_distill.utils.files import write_json_atomic\n"
        "print('before'); write_json_atomic(sys.argv[1], {'a': 1}); print('after')"
    )
    for name in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        file = tmp_path / "out"
        with file.open("wb") as sink:
            subprocess.run([sys.executable, "-c", program, name], stdout=sink, check=True)
        assert file.read_text().split() == ["before", "{", '"a":', "1", "}", "after"]
        command = [sys.executable, "-c", program, name]
        done = subprocess.run(command, capture_output=True, check=True)
        assert done.stdout == file.read_bytes()


@pytest.mark.parametrize("kind", ["folder", "link to a folder", "socket", "loop of links"])
def test_what_is_no_file_is_refused_before_and_at_the_write(tmp_path: Path, kind: str) -> None:
    target, before = tmp_path / "x", tmp_path / "folder"
    before.mkdir()
    if kind == "folder":
        target.mkdir()
    elif kind == "link to a folder":
        target.symlink_to(before)
    elif kind == "loop of links":
        target.symlink_to(target)
    else:
        server = socket.socket(socket.AF_UNIX)
        server.bind(os.path.relpath(target))
        server.close()
    with pytest.raises(RunFolderError, match="could not be written"):
        check_writable(target)
    with pytest.raises(RunFolderError, match=f"cannot write {target}"):
        write_half(target, AssertionError("the block began"))
    assert sorted(os.listdir(tmp_path)) == ["folder", "x"]
    assert os.listdir(before) == []


def test_a_write_protected_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write to all
    with pytest.raises(RunFolderError, match="write-protected"):
        write_half(target, None)
    assert target.read_bytes() == b"old"


def test_a_mount_point_cannot_be_replaced_and_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(source: Path, destination: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    target = tmp_path / "x"
    target.write_bytes(b"older and longer")
    monkeypatch.setattr(os, "replace", busy)
    save(target)
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_the_temporary_path_is_plain_and_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("~", "s3:b", "a b"):
        Path(folder).mkdir()
        with atomic_path(f"{folder}/x") as temporary:
            assert temporary.is_absolute()
            temporary.write_bytes(b"")
        assert os.listdir(folder) == ["x"]


def test_what_systems_leave_in_folders_is_no_content(tmp_path: Path) -> None:
    assert content_of(tmp_path / "missing") == []
    for name in (".DS_Store", "._x", "Thumbs.db", "desktop.ini", "lost+found", "b", "a", ".git"):
        (tmp_path / name).write_text("")
    assert content_of(tmp_path) == [".git", "a", "b"]
