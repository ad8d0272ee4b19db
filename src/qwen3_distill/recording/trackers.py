"""Sends metrics to experiment trackers. Each adapter imports its own library."""

import contextlib
import importlib
import math
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from qwen3_distill.config import LoggingConfig, TrackerConfig
from qwen3_distill.errors import ConfigError, RunFolderError
from qwen3_distill.utils.files import atomic_path

TENSORBOARD_FOLDER = "tensorboard"
RUN_ID_FILE = "tracker_run_id"


class Tracker(Protocol):
    """Receives the metrics of every step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` at ``step``. A value that is not finite is left out."""
        ...

    def close(self) -> None:
        """Flush and end. May be called more than once."""
        ...


def open_trackers(
    config: LoggingConfig,
    run_folder: Path | str,
    run_config: Mapping[str, Any],
    *,
    resume_step: int | None = None,
) -> "TrackerGroup":
    """Open the trackers of ``config``.

    Args:
        run_folder: An existing folder, for the trackers' local files and for the identity under
            which a resumed run continues.
        run_config: The resolved config, as JSON values; shown by W&B and trackio.
        resume_step: Last step that the resumed run keeps; None for a fresh run.

    Raises:
        ConfigError: the package of a tracker is not installed, or its service refuses to start.
        RunFolderError: ``run_folder`` cannot be written.
    """
    folder = Path(run_folder).absolute()  # libraries expand ~ and URLs each in their way
    opened: list[Tracker] = []
    try:
        if config.tensorboard:
            opened.append(TensorBoardTracker(folder / TENSORBOARD_FOLDER, resume_step=resume_step))
        for tracker in config.trackers:
            opened.append(_open(tracker, folder, run_config))
    except BaseException:
        TrackerGroup(opened).close()
        raise
    return TrackerGroup(opened)


class TrackerGroup:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def __len__(self) -> int:
        return len(self._trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Close all, even if one fails; then raise the first failure."""
        with contextlib.ExitStack() as stack:
            for tracker in reversed(self._trackers):
                stack.callback(tracker.close)


class TensorBoardTracker:
    """Event files for TensorBoard."""

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        """Write to ``folder``. On a resume, hide the steps after ``resume_step`` there.

        Raises:
            ConfigError: tensorboard is not installed.
            RunFolderError: ``folder`` cannot be written.
        """
        module = _import("torch.utils.tensorboard", extra=None, setting="logging.tensorboard")
        purge_step = None if resume_step is None else resume_step + 1
        self._folder = folder
        self._has_failed = False
        _silence_writing_threads()
        with self._named_errors():
            self._writer: Any = module.SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with self._named_errors():
            for key, value in _finite(values).items():
                self._writer.add_scalar(key, value, global_step=step)

    def close(self) -> None:
        if not self._has_failed:  # its thread is dead: closing would raise the same error again
            with self._named_errors():
                self._writer.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Name the folder in errors: a write fails in a thread, and the next call raises it."""
        try:
            yield
        except OSError as error:
            self._has_failed = True
            raise RunFolderError(
                f"{self._folder} cannot be written: {error.strerror or error}; free space, choose "
                "another output_dir, or set logging.tensorboard: false"
            ) from error


class WandbLogger:
    """A run on Weights & Biases, or its files for a later ``wandb sync`` when offline."""

    def __init__(
        self,
        project: str,
        run_folder: Path,
        run_config: Mapping[str, Any],
        *,
        offline: bool = False,
    ) -> None:
        """Start the run, or continue the one that this run folder started.

        Raises:
            ConfigError: wandb is not installed, not logged in, or its server cannot be reached.
        """
        wandb = _import("wandb", extra="wandb", setting="logging.trackers kind=wandb")
        try:
            self._run: Any = wandb.init(
                project=project,
                name=run_folder.resolve().name,
                id=_run_id(run_folder),
                dir=str(run_folder),
                config=dict(run_config),
                mode="offline" if offline else "online",
                # Offline there is no server to ask; the id alone joins the parts when synced.
                resume=None if offline else "allow",
                reinit="create_new",  # no global run: others may live in this process
                # stdout belongs to the progress display, and the metadata would hold the command
                # line, whose overrides may be secrets.
                settings=wandb.Settings(console="off", x_disable_meta=True),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"W&B does not start: {str(error).rstrip('. ')}. Log in (`wandb login`), "
                "set offline: true, or remove the tracker from logging.trackers"
            ) from error
        # W&B's own step never goes back: after a resume it would drop the steps done anew.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **_finite(values)})

    def close(self) -> None:
        self._run.finish()


class TrackioLogger:
    """A run in the local trackio database."""

    def __init__(self, project: str, run_folder: Path, run_config: Mapping[str, Any]) -> None:
        """Start the run, or continue the one that this run folder started.

        Raises:
            ConfigError: trackio is not installed.
        """
        trackio = _import("trackio", extra="trackio", setting="logging.trackers kind=trackio")
        self._run: Any = trackio.init(
            project=project,
            name=_run_id(run_folder),  # trackio finds a run to resume by its name
            config=dict(run_config),
            resume="allow",
        )
        self._closed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(_finite(values), step=step)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._run.finish()  # not trackio.finish(): that one depends on the asyncio task


def _open(config: TrackerConfig, folder: Path, run_config: Mapping[str, Any]) -> Tracker:
    if config.kind == "wandb":
        return WandbLogger(config.project, folder, run_config, offline=config.offline)
    return TrackioLogger(config.project, folder, run_config)


def _import(module: str, *, extra: str | None, setting: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = extra or "tensorboard"
        raise ConfigError(
            f"{setting} needs the package {error.name}, which is not installed: "
            f"`pip install {package}`, or switch it off in the config"
        ) from error


def _silence_writing_threads() -> None:
    """Suppress the traceback of TensorBoard's thread when it cannot write.

    The tracker raises the same error where it is handled. The hook stays: the thread may fail after
    the tracker was closed.
    """
    hook = threading.excepthook
    if not (isinstance(hook, partial) and hook.func is _report_others):
        threading.excepthook = partial(_report_others, hook)


def _report_others(
    report: Callable[[threading.ExceptHookArgs], object], failure: threading.ExceptHookArgs
) -> None:
    of_tensorboard = type(failure.thread).__module__.startswith("tensorboard.")
    if not (of_tensorboard and isinstance(failure.exc_value, OSError)):
        report(failure)


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _run_id(folder: Path) -> str:
    """The tracker's permanent id of this run folder; random, as two folders may share a name."""
    path = folder / RUN_ID_FILE
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).strip("-") or "run"
    run_id = f"{name[:80]}-{secrets.token_hex(4)}"
    with atomic_path(path) as temporary:
        temporary.write_text(run_id + "\n", encoding="utf-8")
    return run_id
