"""A finished run folder, read for export. Nothing in it is written."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.errors import RunFolderError
from qwen3_distill.modeling.directory import check_model_dir
from qwen3_distill.recording.records import read_steps
from qwen3_distill.utils.json_text import read_json


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """The records of a finished run folder."""

    path: Path
    config: RunConfig
    summary: dict[str, Any]
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    """One record per step."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def student(self) -> Path:
        return self.path / "student"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def last_start(self) -> dict[str, Any]:
        """The manifest's entry for the process that finished the run."""
        starts = self.manifest.get("starts") or [{}]
        return starts[-1]


def read_finished_run(path: Path) -> FinishedRun:
    """Read the records of a run folder whose student is complete.

    Raises:
        RunFolderError: no run folder, a run that has not finished, or a damaged record.
        ConfigError: the config is not one that this version reads.
        ModelError: ``student/`` is incomplete.
    """
    run = path.resolve()
    config_file = run / "config.json"
    if not config_file.is_file():
        raise RunFolderError(
            f"{path} is not a run folder: it has no config.json; give the output_dir of a run"
        )
    if not (run / "summary.json").is_file():
        raise RunFolderError(
            f"the run in {path} has not finished ({_progress(run)}), so it has no student to "
            f"export; finish it with `qwen3-distill run --config {config_file} output_dir={run}`"
        )
    if not (run / "student").is_dir():
        raise RunFolderError(
            f"the run in {path} has finished, but its student/ is gone; restore the folder, or "
            f"remove {run / 'summary.json'} and start the run again: it writes student/ from its "
            "newest checkpoint"
        )
    check_model_dir(run / "student")
    metrics = run / "metrics.jsonl"
    return FinishedRun(
        path=run,
        config=load_config(config_file, for_records=True),
        summary=_read_object(run / "summary.json"),
        manifest=_read_object(run / "manifest.json"),
        metrics=read_steps(metrics),
    )


@contextmanager
def not_in_use(run: Path) -> Iterator[None]:
    """Hold the run folder's lock for reading, so that no run goes on in it meanwhile.

    Raises:
        RunFolderError: a run is going on in it.
    """
    lock = run / ".lock"
    if not lock.is_file():
        yield
        return
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"run folder {run} is in use by another process; wait for it to end"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise  # file systems without locks are used without one
        yield


def _progress(run: Path) -> str:
    metrics = run / "metrics.jsonl"
    records = read_steps(metrics)
    total = _read_object(run / "config.json").get("steps")
    return f"{records[-1]['step'] if records else 0} of {total} steps are done"


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}; restore the file") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{path} is no JSON object; restore the file")
    return value
