"""The saved rollouts of a run: one file per saved step, and which of them are kept."""

import re
from contextlib import suppress
from pathlib import Path

from qwen3_distill.config.operation import LoggingConfig

_NAME = re.compile(r"step-([0-9]{6,18})\.parquet")


def rollout_file(folder: Path, step: int) -> Path:
    """The file of a saved step."""
    return folder / f"step-{step:06d}.parquet"


def saved_rollouts(folder: Path) -> list[Path]:
    """List the files of the saved steps, the earliest step first."""
    return [path for _, path in _by_step(folder)]


def remove_old_rollouts(folder: Path, step: int, logging: LoggingConfig) -> None:
    """Remove saved rollouts that are older or larger together than the config keeps.

    The first file and the newest one stay: the report compares them.

    Args:
        step: the newest saved step.
    """
    files = [(at, path) for at, path in _by_step(folder) if at <= step]
    middle = files[1:-1]
    if logging.rollouts_kept_steps is not None:
        oldest = step - logging.rollouts_kept_steps
        for at, path in middle:
            if at < oldest:
                path.unlink(missing_ok=True)
        middle = [(at, path) for at, path in middle if at >= oldest]
    room = logging.rollouts_kept_gib * 2**30
    ends = {path for _, path in (*files[:1], *files[-1:])}
    for path in (*ends, *(path for _, path in reversed(middle))):
        with suppress(FileNotFoundError):
            room -= path.stat().st_size
        if room < 0 and path not in ends:
            path.unlink(missing_ok=True)


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*.parquet"))
    return sorted((int(name[1]), path) for name, path in found if name)
