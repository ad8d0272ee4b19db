import errno
import math
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from qwen3_distill.config import LoggingConfig, TrackioTracker, WandbTracker
from qwen3_distill.errors import ConfigError, RunFolderError
from qwen3_distill.recording.trackers import (
    RUN_ID_FILE,
    TENSORBOARD_FOLDER,
    TrackerGroup,
    open_trackers,
)


def _config(*trackers: WandbTracker | TrackioTracker, tensorboard: bool = False) -> LoggingConfig:
    return LoggingConfig(tensorboard=tensorboard, trackers=trackers)


WANDB = WandbTracker(kind="wandb", project="p", offline=True)
TRACKIO = TrackioTracker(kind="trackio", project="p")


def _scalars(folder: Path, key: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    trackers = open_trackers(_config(tensorboard=True), tmp_path, {})
    trackers.log(1, {"loss/a": 0.5, "rollout/accuracy": math.nan})
    trackers.log(2, {"loss/a": 0.25, "rollout/accuracy": 0.75})
    trackers.close()
    folder = tmp_path / TENSORBOARD_FOLDER
    assert _scalars(folder, "loss/a") == [(1, 0.5), (2, 0.25)]
    assert _scalars(folder, "rollout/accuracy") == [(2, 0.75)]


def test_tensorboard_hides_the_steps_that_a_resume_does_anew(tmp_path):
    first = open_trackers(_config(tensorboard=True), tmp_path, {})
    for step in (1, 2, 3, 4):
        first.log(step, {"loss/a": 1.0})
    first.close()
    second = open_trackers(_config(tensorboard=True), tmp_path, {}, resume_step=2)
    second.log(3, {"loss/a": 0.0})
    second.close()
    assert _scalars(tmp_path / TENSORBOARD_FOLDER, "loss/a") == [(1, 1.0), (2, 1.0), (3, 0.0)]


def _fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: RecordWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # like Python's, it names no file

    monkeypatch.setattr(RecordWriter, "write", write)


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[threading.ExceptHookArgs]:
    """What threads report by a traceback otherwise."""
    failures: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    return failures


def _until_refused(trackers: TrackerGroup) -> None:
    for step in range(1000):
        trackers.log(step, {"loss/a": 1.0})
        time.sleep(0.001)


def test_tensorboard_on_a_full_disk_names_its_folder(tmp_path, monkeypatch, reported):
    trackers = open_trackers(_config(tensorboard=True), tmp_path, {})
    _fill_the_disk(monkeypatch)
    folder = tmp_path / TENSORBOARD_FOLDER
    with pytest.raises(RunFolderError, match="No space left") as refusal:
        _until_refused(trackers)
    assert str(folder) in str(refusal.value)
    assert "logging.tensorboard: false" in str(refusal.value)
    trackers.close()
    _join_tensorboard()
    assert not reported


def test_tensorboard_that_cannot_write_the_last_of_it_names_its_folder(
    tmp_path, monkeypatch, reported
):
    trackers = open_trackers(_config(tensorboard=True), tmp_path, {})
    trackers.log(1, {"loss/a": 1.0})
    _fill_the_disk(monkeypatch)
    # It flushes every two minutes; what the last flush cannot write is told by `close` alone.
    monkeypatch.setattr(RecordWriter, "flush", lambda self: RecordWriter.write(self, b""))
    with pytest.raises(RunFolderError, match=TENSORBOARD_FOLDER):
        trackers.close()
    _join_tensorboard()
    assert not reported


def test_other_failures_of_threads_are_still_reported(tmp_path, reported):
    open_trackers(_config(tensorboard=True), tmp_path, {}).close()
    open_trackers(_config(tensorboard=True), tmp_path, {}).close()
    thread = threading.Thread(target=os.stat, args=(tmp_path / "none",))
    thread.start()
    thread.join()
    assert [failure.exc_type for failure in reported] == [FileNotFoundError]


def _join_tensorboard() -> None:
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("tensorboard."):
            thread.join(timeout=5.0)


@pytest.mark.parametrize(
    ("tracker", "install"),
    [(WANDB, "pip install wandb"), (TRACKIO, "pip install trackio")],
)
def test_a_missing_package_names_the_extra_to_install(tmp_path, monkeypatch, tracker, install):
    monkeypatch.setitem(sys.modules, tracker.kind, None)
    with pytest.raises(ConfigError, match=install):
        open_trackers(_config(tracker), tmp_path, {})


def test_what_was_opened_before_a_failure_is_closed(tmp_path, monkeypatch):
    wandb = _FakeWandb(monkeypatch)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError):
        open_trackers(_config(WANDB, TRACKIO), tmp_path, {})
    assert wandb.finished == 1


class _FakeWandb:
    """Records the calls; has the names that the adapter uses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: str | None = None) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.defined: list[tuple[str, str]] = []
        self.finished = 0
        failure = type("Error", (Exception,), {})

        def init(**options: Any) -> "_FakeWandb":
            if error:
                raise failure(error)
            self.inits.append(options)
            return self

        module = SimpleNamespace(
            init=init, errors=SimpleNamespace(Error=failure), Settings=lambda **options: options
        )
        monkeypatch.setitem(sys.modules, "wandb", module)

    def define_metric(self, name: str, step_metric: str) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_steps_as_an_axis_and_only_finite_values(tmp_path, monkeypatch):
    wandb = _FakeWandb(monkeypatch)
    trackers = open_trackers(_config(WANDB), tmp_path, {"steps": 3})
    trackers.log(7, {"loss/a": 0.5, "rollout/accuracy": math.nan})
    trackers.close()
    assert wandb.defined == [("*", "step")]
    assert wandb.logged == [{"step": 7, "loss/a": 0.5}]
    assert wandb.finished == 1
    (options,) = wandb.inits
    assert (options["mode"], options["config"]) == ("offline", {"steps": 3})
    assert options["dir"] == str(tmp_path)


def test_a_resumed_run_keeps_its_wandb_id_and_another_folder_gets_its_own(tmp_path, monkeypatch):
    wandb = _FakeWandb(monkeypatch)
    here, there = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for folder in (here, there):
        folder.mkdir(parents=True)
    for folder in (here, here, there):
        open_trackers(_config(WANDB), folder, {}).close()
    first, second, other = (options["id"] for options in wandb.inits)
    assert first == second == (here / RUN_ID_FILE).read_text().strip()
    assert first.startswith("run-")
    assert other != first


def test_online_wandb_resumes_on_the_server(tmp_path, monkeypatch):
    wandb = _FakeWandb(monkeypatch)
    open_trackers(_config(WandbTracker(kind="wandb", project="p")), tmp_path, {}).close()
    assert (wandb.inits[0]["mode"], wandb.inits[0]["resume"]) == ("online", "allow")


def test_wandb_that_refuses_is_a_config_error(tmp_path, monkeypatch):
    _FakeWandb(monkeypatch, error="No API key configured.")
    with pytest.raises(ConfigError, match=r"No API key configured\. .*offline: true"):
        open_trackers(_config(WANDB), tmp_path, {})


def test_trackio_resumes_by_name(tmp_path, monkeypatch):
    inits: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []
    finished: list[bool] = []
    run = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: finished.append(True),
    )

    def init(**options: Any) -> SimpleNamespace:
        inits.append(options)
        return run

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    for step in (1, 2):
        trackers = open_trackers(_config(TRACKIO), tmp_path, {})
        trackers.log(step, {"a": 1.0, "b": math.inf})
        trackers.close()
        trackers.close()
    assert logged == [(1, {"a": 1.0}), (2, {"a": 1.0})]
    assert len(finished) == 2
    assert inits[0]["name"] == inits[1]["name"]
    assert inits[0]["resume"] == "allow"


def test_all_trackers_are_closed_even_if_one_fails():
    closed: list[str] = []

    def tracker(name: str, *, fails: bool = False) -> Any:
        def close() -> None:
            closed.append(name)
            if fails:
                raise RuntimeError(name)

        return SimpleNamespace(log=lambda step, values: None, close=close)

    group = TrackerGroup([tracker("a"), tracker("b", fails=True), tracker("c")])
    with pytest.raises(RuntimeError, match="b"):
        group.close()
    assert closed == ["a", "b", "c"]


def test_no_trackers_is_fine(tmp_path):
    trackers = open_trackers(_config(), tmp_path, {})
    trackers.log(1, {"a": 1.0})
    trackers.close()
    assert len(trackers) == 0
    assert list(tmp_path.iterdir()) == []
