"""Runs many jobs concurrently, one core each; finished ones are on disk and not repeated."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers

from qwen3_distill.errors import DataError
from qwen3_distill.recording.jsonl import read_jsonl
from qwen3_distill.recording.text import duration
from qwen3_distill.utils.files import atomic_path

Record: TypeAlias = dict[str, Any]


def one_core_processes(count: int) -> Executor:
    """Start worker processes of one thread each: more threads would compete for the cores."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a worker loads torch
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, spawn, _prepare_worker)


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@dataclass(kw_only=True)
class Sweep:
    """Runs jobs in workers and appends each result to a JSON Lines file.

    Jobs start in the order given; with a time limit, shorter ones start in place of those that
    would end too late. A failed run is reported and counted, and the others continue. A second
    sweep with the same log runs the missing jobs.
    """

    log: Path
    workers: int
    time_limit_s: float | None = None
    """No run is started that would end later, judging by the longest of its kind so far."""
    kind_of: Callable[[str], str] = lambda name: ""
    """Returns the kind of a job from its name. Jobs of one kind take about as long; how long, the
    log's `wall_s` tell too."""
    say: Callable[[str], None] = print
    make_workers: Callable[[int], Executor] = one_core_processes
    failed: list[str] = field(default_factory=list)

    def run(self, work: Callable[..., Record], jobs: Mapping[str, Sequence[Any]]) -> list[Record]:
        """Run every job that the log does not hold yet.

        Args:
            work: a function of a module, called in a worker with a job's arguments.
            jobs: arguments by job name, as JSON values.

        Returns:
            The records of all finished jobs, those of earlier sweeps included, with their ``job``
            and ``arguments``.

        Raises:
            DataError: the log holds a job's run with other arguments.
        """
        done = self._finished(jobs)
        waiting = [name for name in jobs if name not in done]
        if done:
            self.say(f"{len(done)} of {len(jobs)} runs are in {self.log} already")
        with self.make_workers(self.workers) as pool:
            self._drain(pool, work, jobs, waiting, done)
        return [done[name] for name in jobs if name in done]

    def _drain(
        self,
        pool: Executor,
        work: Callable[..., Record],
        jobs: Mapping[str, Sequence[Any]],
        waiting: list[str],
        done: dict[str, Record],
    ) -> None:
        clock = _Clock(len(waiting), self.workers, self.time_limit_s)
        for name, record in done.items():
            clock.took(self.kind_of(name), record.get("wall_s", 0.0))
        running: dict[Future[Record], tuple[str, float]] = {}
        while waiting or running:
            for name in list(waiting):
                if len(running) < self.workers and clock.has_time_for(self.kind_of(name)):
                    waiting.remove(name)
                    running[pool.submit(work, *jobs[name])] = (name, time.monotonic())
            if not running:
                self.say(f"time is up: {len(waiting)} runs were not started; resume to do them")
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, started = running.pop(future)
                clock.finished(self.kind_of(name), time.monotonic() - started)
                result = self._result(name, future)
                if result is not None:
                    record = {"job": name, "arguments": list(jobs[name]), **result}
                    done[name] = record
                    self._append(record)
                    self.say(f"{clock.line(len(waiting) + len(running))} {_line(record)}")

    def _result(self, name: str, future: Future[Record]) -> Record | None:
        error = future.exception()
        if error is None:
            return future.result()
        self.failed.append(name)
        self.say(f"{name} failed: {type(error).__name__}: {error}")
        return None

    def _finished(self, jobs: Mapping[str, Sequence[Any]]) -> dict[str, Record]:
        """The records of these jobs in the log; an incomplete last line is removed from it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        records = read_jsonl(self.log) if self.log.exists() else []
        done = {record["job"]: record for record in records if record["job"] in jobs}
        for name, record in done.items():
            if record["arguments"] != list(jobs[name]):
                raise DataError(
                    f"{self.log} holds {name} with {record['arguments']}, this sweep asks for "
                    f"{list(jobs[name])}; choose another log, or the settings of the first sweep"
                )
        with atomic_path(self.log) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        return done

    def _append(self, record: Record) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _line(record: Mapping[str, Any]) -> str:
    """A record's name and numbers for a line of progress; nested values are left out."""
    numbers = (f"{key}={v:.4g}" for key, v in record.items() if isinstance(v, int | float))
    return f"{record['job']}: {' '.join(numbers)}"


class _Clock:
    """Progress and remaining time."""

    def __init__(self, total: int, workers: int, time_limit_s: float | None) -> None:
        self._total, self._workers, self._limit_s = total, workers, time_limit_s
        self._started = time.monotonic()
        self._durations: list[float] = []
        self._longest: dict[str, float] = {}

    def finished(self, kind: str, seconds: float) -> None:
        self._durations.append(seconds)
        self.took(kind, seconds)

    def took(self, kind: str, seconds: float) -> None:
        """Note how long a run of a kind took, in this sweep or an earlier one."""
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def has_time_for(self, kind: str) -> bool:
        """Return whether a run as long as the longest of its kind, or of all, would end in time."""
        longest_s = self._longest.get(kind, max(self._longest.values(), default=0.0))
        return self._limit_s is None or self._elapsed_s + longest_s <= self._limit_s

    def line(self, left: int) -> str:
        """``[done/total, elapsed, ETA]``."""
        mean_s = sum(self._durations) / len(self._durations)
        eta = duration(left * mean_s / self._workers)
        done = len(self._durations)
        return f"[{done}/{self._total}, {duration(self._elapsed_s)}, ETA {eta}]"
