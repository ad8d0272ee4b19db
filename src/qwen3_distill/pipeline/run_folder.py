"""The run folder: paths of a run's files, its lock, and its config across restarts."""

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from typing_extensions import Self

from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import check_config, config_differences, dump_config
from qwen3_distill.config.moved import PATH_SETTINGS, run_directory
from qwen3_distill.config.redaction import recordable
from qwen3_distill.config.several import as_of_one_teacher
from qwen3_distill.errors import ConfigError, RunFolderError
from qwen3_distill.pipeline.identity import RunIdentity, config_digest
from qwen3_distill.pipeline.own_folder import refuse_inputs_as_student, require_own_folder
from qwen3_distill.recording.cost_records import COST_FILE
from qwen3_distill.recording.heartbeat import STATUS_FILE
from qwen3_distill.recording.records import read_summary
from qwen3_distill.recording.trace import TRACE_FILE
from qwen3_distill.utils.files import write_json_atomic
from qwen3_distill.utils.json_text import read_json

MAY_CHANGE = (
    *("logging", "checkpoint", "cost", "planning", "pipeline.mps", "pipeline.stall_timeout_s"),
    # Any engine's process.
    *(
        f"{section}.{key}"
        for section in ("generation", "scoring", "training")
        for key in (
            *("python", "environment", "threads"),
            *("start_timeout_s", "hang_timeout_s", "max_restarts"),
        )
    ),
    # Memory and speed: how much is computed at a time, not what.
    *("generation.max_batched_tokens", "generation.kv_cache_gib"),
    *("scoring.batch_tokens", "scoring.chunk_tokens", "scoring.chunked_prefill_tokens"),
    *("scoring.memory_fraction", "scoring.max_total_tokens"),
    *("scoring.max_model_tokens", "scoring.max_sequences"),
    *("training.micro_batch_tokens", "training.chunk_tokens", "training.memory_gib"),
    "training.gradient_checkpointing",
    # Where the teacher is reached, how often and for how long; what answers there is checked.
    *("scoring.urls", "scoring.api_key_file", "scoring.port", "scoring.cache"),
    *("scoring.request_tokens", "scoring.request_timeout_s"),
    *("scoring.max_in_flight", "scoring.max_attempts"),
    # Where engines run, and how many: other batches, and another order of sums over ranks.
    "cluster",
)
"""Settings and sections that may change when a run is resumed.

They say how it is operated, and include every setting that an error message says to change. None
changes what is sampled, scored, trained or evaluated, or in which order, beyond the rounding of
another batch size or number of threads. `steps` may be raised as well, not lowered.
"""


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """Add settings that are newer than the run, at their defaults; keep what is not a config."""
    try:
        return dump_config(check_config(saved))
    except ConfigError:
        return saved


_STEPS_LOWERED = (
    "steps may be raised, not lowered: the learning rate of earlier steps may depend on them, and "
    "what was trained is not taken back; Ctrl-C ends a run early and saves it"
)
_TORCH_WRITER = re.compile("inline_container|PytorchStreamWriter")
"""Text of the RuntimeError that `torch.save` raises when a write fails."""


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Raise one error for the several that libraries raise when they cannot write a model.

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
        RunFolderError: not writable, held by another process, with files of something else, made
            by another config, or with a damaged config or manifest.
        ConfigError: an input of the run lies where the run writes its student.
    """

    def __init__(self, config: RunConfig) -> None:
        self.path = config.output_path
        self._lock: IO[str] | None = None
        self._values = recordable(dump_config(config))
        self._config_digest = config_digest(config, MAY_CHANGE)
        self._identity: RunIdentity | None = None
        self.changes: list[str] = []
        """``key: old -> new`` for each `MAY_CHANGE` setting that differs from the last start, and
        for raised `steps`."""
        self.extended_from: int | None = None
        """The `steps` of the last start, where this start raises them."""
        require_own_folder(self.path)
        refuse_inputs_as_student(config)
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
            self._check_config()
            self.read_starts()  # damaged, it is said before models are loaded
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
    def prompt(self) -> Path:
        """The first prompt as the chat template renders it, for the report."""
        return self.path / "prompt.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def ledger(self) -> Path:
        """The rollouts that each step trained on or dropped: each appears once."""
        return self.path / "ledger.jsonl"

    @property
    def cost(self) -> Path:
        """The cost of every step, also of the steps that a crash lost."""
        return self.path / COST_FILE

    @property
    def trace(self) -> Path:
        return self.path / TRACE_FILE

    @property
    def status(self) -> Path:
        """Where the run is now; another process may read it."""
        return self.path / STATUS_FILE

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
    def console_log(self) -> Path:
        """Notes on the run's console: an output that was closed."""
        return self.path / "logs" / "console.log"

    @property
    def is_finished(self) -> bool:
        """Whether the summary exists, the last file of a run except for the report, and this start
        does not raise `steps`."""
        return self.summary.exists() and self.extended_from is None

    def read_summary(self) -> dict[str, Any]:
        """Read the summary.

        Raises:
            DataError: it has another form.
        """
        return read_summary(self.summary)

    def read_starts(self) -> list[Any]:
        """Read the manifest's entries of earlier starts.

        Raises:
            RunFolderError: the manifest is damaged.
        """
        return self._read_manifest().get("starts", [])

    def read_inputs(self) -> dict[str, dict[str, Any]]:
        """Read the manifest's records of student, teacher and data; empty without a manifest."""
        content = self._read_manifest()
        roles = ("student", "teacher", "teachers", "data")
        records = {role: content.get(role) for role in roles}
        return {role: record for role, record in records.items() if isinstance(record, dict)}

    @property
    def identity(self) -> RunIdentity:
        """The marks of this run's checkpoints; drawn for a folder without records."""
        if self._identity is None:
            recorded = self._read_manifest()
            run_id, digest = recorded.get("run_id"), recorded.get("config_digest")
            if not self.has_records:
                self._identity = RunIdentity.new(self._config_digest)
            elif isinstance(run_id, str) and isinstance(digest, str):
                self._identity = RunIdentity(run_id=run_id, config_digest=digest)
            else:
                self._identity = RunIdentity(run_id=None, config_digest=self._config_digest)
        return self._identity

    def _read_manifest(self) -> dict[str, Any]:
        if not self.manifest.exists():
            return {}
        remedy = (
            "restore the file, or remove it: the run then goes on without the record of its "
            "earlier starts"
        )
        try:
            content = read_json(self.manifest)
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{self.manifest} cannot be read: {error}; {remedy}") from error
        starts = content.get("starts") if isinstance(content, dict) else None
        if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
            raise RunFolderError(
                f"{self.manifest} is no manifest: expected an object with a list `starts` of "
                f"objects; {remedy}"
            )
        return content

    def accept_changes(self) -> None:
        """Write the changed config into the folder, once a resumed run has started."""
        if self.changes:
            if self.extended_from is not None:
                # First: without it, any start goes on from the newest checkpoint.
                self.summary.unlink(missing_ok=True)
                self.extended_from = None
            write_json_atomic(self.config, self._values, private=True)
            self.changes = []

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
                raise  # the file system has no locks: go on without one

    @property
    def has_records(self) -> bool:
        """Whether the folder has a step, an evaluation or a checkpoint; else any config may start.

        A start that failed, say on a misspelt path, must not hold the folder for that config.
        """
        logs = (self.metrics, self.evaluations)
        return any(log.exists() and log.stat().st_size for log in logs) or any(
            self.checkpoints.glob("step-*")
        )

    def _read_config(self) -> dict[str, Any]:
        try:
            values = read_json(self.config)
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

    def _is_same_path(self, key: str, old: dict[str, Any]) -> bool:
        """Whether a path setting names the same file as before, from another working directory."""
        before, now = _setting(old, key), _setting(self._values, key)
        directory = run_directory(self.config)
        is_path = as_of_one_teacher(key) in PATH_SETTINGS
        if not is_path or directory is None or not isinstance(before, str):
            return False
        return isinstance(now, str) and os.path.realpath(now) == os.path.realpath(
            directory / before
        )

    def _check_config(self) -> None:
        if not self.config.exists() or not self.has_records:
            write_json_atomic(self.config, self._values, private=True)
            return
        old = self._read_config()
        saved = recordable(_with_defaults(old))
        if old != recordable(old):  # of a version that kept secrets
            write_json_atomic(self.config, recordable(old), private=True)
        differences = [
            line
            for line in config_differences(saved, self._values)
            if not line.startswith("output_dir:")  # a folder may be moved
            and not self._is_same_path(line.partition(":")[0], old)
        ]
        steps = saved.get("steps")
        if isinstance(steps, int) and self._values["steps"] > steps:
            self.extended_from = steps
        self.changes = [line for line in differences if self._may_change(line.partition(":")[0])]
        refused = [
            f"{line} ({_STEPS_LOWERED})" if line.startswith("steps:") else line
            for line in differences
            if line not in self.changes
        ]
        if refused:
            shown = "\n  ".join(refused[:8])
            if len(refused) > 8:
                shown += f"\n  and {len(refused) - 8} more"
            raise RunFolderError(
                f"run folder {self.path} was made by another config:\n  {shown}\n"
                "choose another output_dir, or remove the folder to start again"
            )
        self._check_can_extend()

    def _check_can_extend(self) -> None:
        """Raise if a complete run is to go on and has no checkpoint: it would begin anew."""
        if self.extended_from is None or not self.summary.exists():
            return
        if not any(self.checkpoints.glob("step-*")):
            raise RunFolderError(
                f"steps is raised, but {self.checkpoints} has no checkpoint to go on from; restore "
                "the checkpoints, or choose another output_dir with student.model="
                f"{self.student} to train that student further as a new run"
            )

    def _may_change(self, key: str) -> bool:
        if key == "steps":
            return self.extended_from is not None
        plain = as_of_one_teacher(key)
        return any(plain == place or plain.startswith(f"{place}.") for place in MAY_CHANGE)


def _setting(values: dict[str, Any], key: str) -> Any:
    node: Any = values
    for name in key.split("."):
        if isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        else:
            node = node.get(name) if isinstance(node, dict) else None
    return node
