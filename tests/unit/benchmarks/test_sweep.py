"""A sweep loses no finished run, does none twice, and mixes no settings."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.sweep import Record, Sweep
from qwen3_distill.errors import DataError
from qwen3_distill.recording.jsonl import read_jsonl

JOBS = {f"job-{n}": [n, {"steps": 3}] for n in range(5)}


class Work:
    """Counts its calls; fails for chosen numbers."""

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.calls: list[int] = []
        self._failing = failing
        self._lock = threading.Lock()

    def __call__(self, number: int, settings: dict[str, Any]) -> Record:
        with self._lock:
            self.calls.append(number)
        if number in self._failing:
            raise ValueError(f"no {number}")
        return {"square": number**2}


def sweep_of(log: Path, said: list[str] | None = None, **changes: Any) -> Sweep:
    say = [].append if said is None else said.append
    return Sweep(log=log, workers=2, say=say, make_workers=ThreadPoolExecutor, **changes)


def test_every_job_is_done_once_and_is_on_disk(tmp_path: Path) -> None:
    log, work = tmp_path / "new" / "runs.jsonl", Work()
    records = sweep_of(log).run(work, JOBS)
    assert [record["job"] for record in records] == list(JOBS)
    assert [record["square"] for record in records] == [0, 1, 4, 9, 16]
    assert sorted(work.calls) == [0, 1, 2, 3, 4]
    assert sorted(read_jsonl(log), key=lambda record: record["job"]) == records


def test_jobs_start_in_the_order_given(tmp_path: Path) -> None:
    work = Work()
    sweep = Sweep(
        log=tmp_path / "runs.jsonl",
        workers=1,
        say=[].append,
        make_workers=ThreadPoolExecutor,
    )
    sweep.run(work, dict(reversed(JOBS.items())))
    assert work.calls == [4, 3, 2, 1, 0]


def test_a_failed_run_is_told_and_done_again_by_the_next_sweep(tmp_path: Path) -> None:
    log, said = tmp_path / "runs.jsonl", list[str]()
    sweep = sweep_of(log, said)
    records = sweep.run(Work(failing=(1, 3)), JOBS)
    assert sorted(sweep.failed) == ["job-1", "job-3"]
    assert [record["square"] for record in records] == [0, 4, 16]
    assert "job-1 failed: ValueError: no 1" in said
    work = Work()
    assert len(sweep_of(log).run(work, JOBS)) == 5
    assert sorted(work.calls) == [1, 3]


def test_a_line_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    log = tmp_path / "runs.jsonl"
    sweep_of(log).run(Work(), JOBS)
    log.write_bytes(log.read_bytes()[:-9])
    work = Work()
    assert len(sweep_of(log).run(work, JOBS)) == 5
    assert len(work.calls) == 1
    assert len(read_jsonl(log)) == 5


def test_runs_with_other_arguments_are_not_taken_for_these(tmp_path: Path) -> None:
    log = tmp_path / "runs.jsonl"
    sweep_of(log).run(Work(), JOBS)
    with pytest.raises(DataError, match="job-0 with"):
        sweep_of(log).run(Work(), JOBS | {"job-0": [0, {"steps": 4}]})


def test_records_of_jobs_that_are_not_asked_for_stay_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "runs.jsonl"
    sweep_of(log).run(Work(), JOBS)
    assert len(sweep_of(log).run(Work(), {"job-2": JOBS["job-2"]})) == 1
    assert len(read_jsonl(log)) == 5


def test_no_run_starts_that_would_end_too_late(tmp_path: Path) -> None:
    said, work = list[str](), Work()
    assert sweep_of(tmp_path / "runs.jsonl", said, time_limit_s=-1.0).run(work, JOBS) == []
    assert work.calls == []
    assert said == ["time is up: 5 runs were not started; resume to do them"]


def test_shorter_runs_start_where_the_time_is_too_short_for_others(tmp_path: Path) -> None:
    log, work = tmp_path / "runs.jsonl", Work()
    jobs = {f"{kind}/{n}": [n, {"steps": 3}] for n, kind in enumerate(["long", "short"] * 3)}
    earlier = [
        {"job": f"{k}/{n}", "arguments": jobs[f"{k}/{n}"], "wall_s": s}
        for k, n, s in [("long", 0, 100.0), ("short", 1, 1.0)]
    ]
    log.write_text("".join(json.dumps(record) + "\n" for record in earlier))
    said = list[str]()
    sweep = sweep_of(log, said, time_limit_s=50.0, kind_of=lambda name: name.partition("/")[0])
    assert [record["job"] for record in sweep.run(work, jobs)] == [
        "long/0",
        "short/1",
        "short/3",
        "short/5",
    ]
    assert said[-1] == "time is up: 2 runs were not started; resume to do them"


def test_progress_tells_the_count_and_the_runs_numbers(tmp_path: Path) -> None:
    said = list[str]()
    sweep_of(tmp_path / "runs.jsonl", said).run(Work(), {"job-3": JOBS["job-3"]})
    (line,) = said
    assert line.startswith("[1/1, ")
    assert line.endswith("job-3: square=9")
