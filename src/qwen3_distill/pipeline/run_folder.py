"""The run folder: where everything of a run lies, and who may write there."""

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from typing_extensions import Self

from qwen3_distill.config import RunConfig
from qwen3_distill.config_io import config_differences, dump_config
from qwen3_distill.errors import RunFolderError
from qwen3_distill.reporting.trace import TRACE_FILE
from qwen3_distill.utils.files import write_json_atomic

_TORCH_WRITER = re.compile("inline_container|PytorchStreamWriter")
"""`torch.save` reports a failed write as a RuntimeError that only its text tells from others."""


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Writing models under ``path``: one error for the ways in which libraries say "disk full".

    Raises:
        RunFolderError: safetensors or PyTorch could not write.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _TORCH_WRITER.search(str(error)):
            raise
        raise RunFolderError(
            f"cannot write {path}: {error}; free space, then start the same command again"
        ) from error


class RunFolder:
    """Paths of one run, held by one process at a time.

    Raises:
        RunFolderError: not writable, held by another process, or made by another config.
    """

    def __init__(self, config: RunConfig) -> None:
        self.path = config.output_path
        self._lock: IO[str] | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
        except OSError as error:
            raise RunFolderError(
                f"run folder {self.path} cannot be written: {error.strerror}; choose another "
                "output_dir"
            ) from error
        try:
            self._acquire()
            self._check_config(dump_config(config))
        except BaseException:
            self.close()
            raise

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def ledger(self) -> Path:
        """Which rollouts each step trained on: none is trained on twice, none lost uncounted."""
        return self.path / "ledger.jsonl"

    @property
    def trace(self) -> Path:
        return self.path / TRACE_FILE

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def student(self) -> Path:
        return self.path / "student"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def is_finished(self) -> bool:
        """The summary is the last file a run writes, the report aside."""
        return self.summary.exists()

    def read_summary(self) -> dict[str, Any]:
        return json.loads(self.summary.read_text())

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _acquire(self) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"run folder {self.path} is in use by another process; wait for it or choose "
                "another output_dir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, os.EX_OSERR):
                raise  # file systems without locks are used without one

    def _has_records(self) -> bool:
        """Whether a step, an evaluation or a checkpoint was made; else any config may start here.

        A start that failed, say on a misspelt path, must not hold the folder for that config.
        """
        logs = (self.metrics, self.evaluations)
        return any(log.exists() and log.stat().st_size for log in logs) or any(
            self.checkpoints.glob("step-*")
        )

    def _read_config(self) -> dict[str, Any]:
        try:
            values = json.loads(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{self.config} cannot be read: {error}; restore the file, or choose another "
                "output_dir"
            ) from error
        if not isinstance(values, dict):
            raise RunFolderError(
                f"{self.config} holds a {type(values).__name__}, expected a config; restore the "
                "file, or choose another output_dir"
            )
        return values

    def _check_config(self, new: dict[str, Any]) -> None:
        if not self.config.exists() or not self._has_records():
            write_json_atomic(self.config, new)
            return
        old = self._read_config()
        differences = [
            line
            for line in config_differences(old, new)
            if not line.startswith("output_dir:")  # a folder may be moved
        ]
        if differences:
            shown = "\n  ".join(differences[:8])
            if len(differences) > 8:
                shown += f"\n  and {len(differences) - 8} more"
            raise RunFolderError(
                f"run folder {self.path} was made by another config:\n  {shown}\n"
                "choose another output_dir, or remove the folder to start again"
            )
