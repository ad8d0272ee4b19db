"""A session's temporary files: where they are, and which of them are left."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import session_folder
from tests.conftest import pytest_sessionfinish
from tests.session_folder import FOLDER, VARIABLE, make_folder, roomy_parent

ExitCode = pytest.ExitCode
ROOT = Path(__file__).parents[2]


def test_temporary_files_of_this_process_and_of_its_children_are_the_sessions(
    tmp_path: Path,
) -> None:
    assert Path(tempfile.gettempdir()) == FOLDER
    assert FOLDER in tmp_path.parents
    command = [sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"]
    assert subprocess.check_output(command, text=True).strip() == str(FOLDER)


PROGRAM = """
import tempfile
from tests import session_folder
print(tempfile.mkdtemp())
session_folder.keep(session_folder.FOLDER) if {keeps} else None
"""


@pytest.mark.parametrize("keeps", [False, True])
def test_a_session_leaves_nothing_but_what_it_keeps(
    keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE)  # another session
    command = [sys.executable, "-c", PROGRAM.format(keeps=keeps)]
    made = Path(subprocess.check_output(command, text=True, cwd=ROOT).strip())
    assert (made.exists(), made.parent.exists()) == (keeps, keeps)
    shutil.rmtree(made.parent, ignore_errors=True)


@pytest.mark.parametrize(
    ("status", "keeps"), [(ExitCode.OK, 0), (ExitCode.TESTS_FAILED, 1), (ExitCode.INTERRUPTED, 0)]
)
def test_a_session_keeps_its_files_where_a_test_failed(
    status: ExitCode, keeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Path] = []
    monkeypatch.setattr(session_folder, "keep", kept.append)
    pytest_sessionfinish(status)
    assert kept == [FOLDER] * keeps


def test_files_are_in_memory_only_where_it_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    free = session_folder.ROOM_BYTES
    monkeypatch.setattr(session_folder, "MEMORY", FOLDER)
    monkeypatch.setattr(
        session_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=free)
    )
    assert roomy_parent() == FOLDER
    monkeypatch.setattr(session_folder, "ROOM_BYTES", free + 1)
    monkeypatch.setattr(tempfile, "tempdir", "/elsewhere")
    assert roomy_parent() == Path("/elsewhere")


def test_folders_of_live_sessions_are_left_alone(tmp_path: Path) -> None:
    for pid in (1, os.getppid(), 2**22 + 1):
        (tmp_path / f"q3dt-{pid}").mkdir()
    made = make_folder(tmp_path)
    assert made.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in tmp_path.iterdir()} == {
        "q3dt-1",
        f"q3dt-{os.getppid()}",
        made.name,
    }
