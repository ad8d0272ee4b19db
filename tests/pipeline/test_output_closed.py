"""A pipe or terminal that is closed ends no command; what could not be printed is on record."""

import errno
import io
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_distill.recording.output import announce_loss, output_losses, surviving_output
from qwen3_distill.recording.trace import read_trace
from tests.pipeline.builders import EVALUATION, read_json, tiny_values, write_config
from tests.tiny_models import TinyModels

PROGRAM = "import sys; from qwen3_distill.cli.main import main; main(sys.argv[1:])"


def start(*arguments: str | Path, stdout: int, stderr: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, stdout=stdout, stderr=stderr)


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    ours, theirs = pty.openpty()
    os.close(ours)
    return theirs


@pytest.mark.parametrize(
    ("end", "name"),
    [(closed_pipe, "stdout"), (closed_pipe, "both"), (closed_terminal, "stdout")],
)
def test_run_goes_on_without_its_output(
    end: Callable[[], int], name: str, tiny_models: TinyModels, run_dir: Path, tmp_path: Path
) -> None:
    changes = {"steps": 2, "evaluation": EVALUATION}
    config = write_config(tmp_path / "c.yaml", tiny_values(tiny_models, run_dir, changes))
    closed = end()
    streams: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    streams |= {"stdout": closed, "stderr": closed} if name == "both" else {name: closed}
    process = start("run", "--config", config, **streams)
    os.close(closed)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert read_json(run_dir / "summary.json")["steps"] == 2
    assert (run_dir / "student" / "config.json").exists()
    events = read_trace(run_dir / "trace.json")
    notes = [event["name"] for event in events if event.get("cat") == "console"]
    assert len(notes) == (2 if name == "both" else 1)
    assert "standard output is closed" in notes[0]
    assert "standard output is closed" in (run_dir / "logs" / "console.log").read_text()
    if name == "stdout":
        assert err.decode().count("standard output is closed") == 1
        assert "the work goes on" in err.decode()


def test_reader_that_ends_in_the_middle_ends_no_run(
    tiny_models: TinyModels, run_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_values(tiny_models, run_dir, {"steps": 2}))
    process = start("run", "--config", config, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"checking")
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert process.stderr is not None
    assert process.stderr.read().count(b"standard output is closed") == 1
    process.stderr.close()
    assert (run_dir / "summary.json").exists()


def test_exit_status_is_the_works(tiny_models: TinyModels, run_dir: Path, tmp_path: Path) -> None:
    values = tiny_values(tiny_models, run_dir, {"student.model": "nowhere"})
    config = write_config(tmp_path / "c.yaml", values)
    closed = closed_pipe()
    process = start("run", "--config", config, stdout=closed, stderr=closed)
    os.close(closed)
    assert process.wait(timeout=300) == 2


def test_offline_stage_writes_its_file_without_its_output(
    tiny_models: TinyModels, run_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_values(tiny_models, run_dir))
    out, closed = tmp_path / "r.parquet", closed_pipe()
    command = ("generate", "--config", config, "--out", out)
    process = start(*command, stdout=closed, stderr=subprocess.PIPE)
    os.close(closed)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, out.exists()) == (0, True)
    assert err.decode().count("the work goes on") == 1


@pytest.mark.parametrize(
    "command", [["config", "schema"], ["config", "reference"], ["--help"], ["--version"]]
)
def test_command_whose_output_is_the_result_ends_quietly(command: list[str]) -> None:
    closed = closed_pipe()
    process = start(*command, stdout=closed, stderr=subprocess.PIPE)
    os.close(closed)
    assert process.communicate(timeout=300)[1] == b""
    assert process.returncode == 0


def test_descriptors_that_the_caller_closed_are_not_given_to_files(
    tiny_models: TinyModels, run_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_values(tiny_models, run_dir, {"steps": 1}))
    shell = ["bash", "-c", f'"$0" -c "{PROGRAM}" "$@" <&- >&- 2>&-']
    done = subprocess.run(
        [*shell, sys.executable, "run", "--config", str(config)],
        check=False,
        timeout=300,
    )
    assert done.returncode == 0
    assert (run_dir / ".lock").read_bytes() == b""
    assert (run_dir / "summary.json").exists()


# --- The stream ----------------------------------------------------------------------------------


class Failing(io.StringIO):
    """A stream whose every write fails."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error
        self.attempts = 0

    def write(self, text: str) -> int:
        self.attempts += 1
        raise self.error


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ECONNRESET])
def test_loss_is_announced_once_and_later_writes_are_dropped(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, said = Failing(OSError(number, "gone")), list[str]()
    monkeypatch.setattr(sys, "stdout", stream)
    with surviving_output():
        announce_loss(said.append)
        sys.stdout.write("a")
        sys.stdout.write("b")
        sys.stdout.writelines(["c", "d"])
        assert (
            said
            == list(output_losses())
            == ["standard output is closed (gone): what is printed there is dropped"]
        )
    assert stream.attempts == 1
    assert sys.stdout is stream
    with surviving_output():
        assert output_losses() == ()


def test_full_disk_behind_an_output_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(OSError(errno.ENOSPC, "No space left on device")))
    with surviving_output(), pytest.raises(OSError, match="No space left"):
        sys.stdout.write("a")


def test_output_that_would_block_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(reader, "rb") as source, os.fdopen(writer, "w") as sink:
        monkeypatch.setattr(sys, "stdout", sink)
        process = subprocess.Popen(["wc", "-c"], stdin=source, stdout=subprocess.PIPE)
        source.close()
        with surviving_output():
            for _ in range(100):
                sys.stdout.write("x" * 9_999 + "\n")
                sys.stdout.flush()
        sink.close()
        assert process.communicate(timeout=300)[0].strip() == b"1000000"
