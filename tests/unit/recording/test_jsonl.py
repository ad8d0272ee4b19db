import json
import math
import os
from pathlib import Path

import pytest

from qwen3_distill.errors import DataError, RunFolderError
from qwen3_distill.recording.jsonl import JsonlLog, combine, read_jsonl
from qwen3_distill.types import Metric


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_combine_uses_each_metrics_own_reduction():
    merged = combine(
        [
            Metric.mean("loss/a", total=6.0, count=3),
            Metric.sum("tokens/b", 10),
            Metric.max("health/c", 2.0),
            Metric.last("optim/d", 1.0),
            Metric.mean("loss/a", total=14.0, count=1),
            Metric.sum("tokens/b", 5),
            Metric.max("health/c", 1.0),
            Metric.last("optim/d", 0.5),
        ]
    )
    # The mean is of 4 values, not of two means (which would be 8).
    assert merged == {"loss/a": 5.0, "tokens/b": 15, "health/c": 2.0, "optim/d": 0.5}


def test_combine_of_nothing_to_average_is_nan():
    assert math.isnan(combine([Metric.mean("a", 0.0, 0)])["a"])


def test_combine_refuses_two_reductions_of_one_key():
    with pytest.raises(ValueError, match="cannot combine"):
        combine([Metric.sum("a", 1), Metric.max("a", 1)])


def test_every_line_is_on_disk_when_log_returns(path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = JsonlLog(path)
    log.log(1, {"loss/a": 0.5, "wall_s": 2.0})
    assert read_jsonl(path) == [{"step": 1, "loss/a": 0.5, "wall_s": 2.0}]  # not yet closed
    assert len(synced) == 1
    log.log(2, {"loss/a": 0.25})
    assert len(read_jsonl(path)) == len(synced) == 2
    log.close()
    log.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_becomes_null(path, value):
    JsonlLog(path).log(1, {"a": value, "b": 1.0})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "a": None, "b": 1.0}


def test_step_may_not_be_given_twice(path):
    with pytest.raises(ValueError, match="step"):
        JsonlLog(path).log(1, {"step": 2})


def test_steps_never_go_back(path):
    log = JsonlLog(path)
    log.log(5, {})
    log.log(5, {"model": "teacher"})  # evaluations: two models at one step
    with pytest.raises(RunFolderError, match="truncate_after"):
        log.log(4, {})


def test_a_reopened_log_knows_its_last_step(path):
    first = JsonlLog(path)
    first.log(5, {})
    first.close()
    with pytest.raises(RunFolderError, match="truncate_after"):
        JsonlLog(path).log(4, {})


def test_truncate_after_drops_later_steps_and_goes_on(path):
    log = JsonlLog(path)
    for step in (1, 2, 3, 4):
        log.log(step, {"a": step / 10})
    log.truncate_after(2)
    log.log(3, {"a": 9.0})
    assert [(r["step"], r["a"]) for r in read_jsonl(path)] == [(1, 0.1), (2, 0.2), (3, 9.0)]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_truncate_after_everything_leaves_an_empty_log(path):
    log = JsonlLog(path)
    log.log(3, {})
    log.truncate_after(0)
    log.log(1, {})
    assert [r["step"] for r in read_jsonl(path)] == [1]


@pytest.mark.parametrize("tear", [b'{"step": 3, "a": 0.', b'{"st', b"\x00\x00\x00", b'{"a": "\xc3'])
def test_a_torn_last_line_is_dropped_and_never_glued_to(path, tear):
    log = JsonlLog(path)
    log.log(1, {"a": 1.0})
    log.log(2, {"a": 2.0})
    log.close()
    with path.open("ab") as file:
        file.write(tear)
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]
    resumed = JsonlLog(path)
    resumed.log(3, {"a": 3.0})
    assert [r["step"] for r in read_jsonl(path)] == [1, 2, 3]


def test_a_whole_last_line_counts_without_its_newline(path):
    path.write_text('{"step": 1}\n{"step": 2}')
    JsonlLog(path).log(3, {})
    assert [r["step"] for r in read_jsonl(path)] == [1, 2, 3]


def test_a_malformed_line_within_is_an_error_with_its_number(path):
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_jsonl(path)


def test_records_without_a_step_are_refused(path):
    path.write_text('{"loss": 1}\n')
    with pytest.raises(DataError, match="step"):
        JsonlLog(path)


def test_half_a_line_on_a_full_disk_is_taken_back(path, monkeypatch):
    log = JsonlLog(path)
    log.log(1, {"a": 1.0})
    write = os.write

    def full_before_the_last_bytes(fd: int, data: bytes) -> int:
        if len(data) == 5:
            raise OSError(28, "No space left on device")
        return write(fd, data[:-5])

    monkeypatch.setattr(os, "write", full_before_the_last_bytes)
    with pytest.raises(RunFolderError, match="No space left"):
        log.log(2, {"a": 2.0})
    monkeypatch.undo()
    log.log(2, {"a": 2.5})
    assert path.read_text() == '{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.5}\n'


def test_a_path_that_cannot_be_written_is_a_run_folder_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError):
        JsonlLog(tmp_path / "file" / "metrics.jsonl")


def test_a_closed_log_refuses(path):
    log = JsonlLog(path)
    log.close()
    with pytest.raises(RunFolderError, match="closed"):
        log.log(1, {})


def test_reading_a_missing_file_says_so(path):
    with pytest.raises(FileNotFoundError):
        read_jsonl(path)
