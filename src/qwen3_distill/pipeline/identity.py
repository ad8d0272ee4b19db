"""Says which run a checkpoint belongs to: the run's id and the digest of its config."""

import hashlib
import json
import uuid
from dataclasses import dataclass
from typing import Any

from qwen3_distill.config import RunConfig
from qwen3_distill.config.moved import PATH_SETTINGS
from qwen3_distill.config.redaction import recordable
from qwen3_distill.config.several import teacher_values


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The marks that a run writes into its manifest and the cursor of every checkpoint."""

    run_id: str | None
    """Drawn when the run began; None: unknown, of a run that an older version began, or whose
    manifest is lost."""
    config_digest: str
    """The digest of the settings that decide what is learned, as the run began with them."""

    @classmethod
    def new(cls, config_digest: str) -> "RunIdentity":
        return cls(run_id=uuid.uuid4().hex[:16], config_digest=config_digest)

    def difference(self, run_id: object, config_digest: object) -> str | None:
        """Return how a checkpoint with these marks is of another run; None if it is of this one.

        A checkpoint without marks, written by an older version, is of this run only if this run's
        id is unknown.
        """
        if self.run_id is not None and run_id != self.run_id:
            return f"its run is {run_id or 'unknown'}, this one is {self.run_id}"
        unmarked = run_id is None and config_digest is None
        if config_digest != self.config_digest and not (unmarked and self.run_id is None):
            return (
                f"the digest of its run's config is {config_digest}, that of this one is "
                f"{self.config_digest}"
            )
        return None


def config_digest(config: RunConfig, may_change: tuple[str, ...]) -> str:
    """Return the digest of the settings that a resumed run may not change.

    Paths do not count: files are told apart by what they hold. Settings at their defaults do not
    count either, so that a version with more settings reads the same run.

    Args:
        may_change: settings and sections that are left out.
    """
    values = recordable(config.model_dump(mode="json", exclude_defaults=True))
    for key in (*may_change, *PATH_SETTINGS, "output_dir", "steps"):
        _remove(values, key.split("."))
        section, _, name = key.partition(".")
        if section == "scoring":
            for _, teacher in teacher_values(values):
                teacher.pop(name, None)
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _remove(values: dict[str, Any], path: list[str]) -> None:
    node: Any = values
    for name in path[:-1]:
        node = node.get(name) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(path[-1], None)
