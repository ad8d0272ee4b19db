"""Which saved rollouts a run keeps, and which its report reads."""

from pathlib import Path

import pytest

from qwen3_distill.config.operation import LoggingConfig
from qwen3_distill.pipeline.rollout_store import (
    remove_old_rollouts,
    rollout_file,
    saved_rollouts,
)
from qwen3_distill.report.rollout_view import shown_steps


def save(folder: Path, steps: range, logging: LoggingConfig, num_bytes: int = 1000) -> list[int]:
    for step in steps:
        rollout_file(folder, step).write_bytes(bytes(num_bytes))
        remove_old_rollouts(folder, step, logging)
    return [int(path.stem.removeprefix("step-")) for path in saved_rollouts(folder)]


def test_all_are_kept_by_default(tmp_path: Path) -> None:
    assert save(tmp_path, range(0, 100, 10), LoggingConfig()) == list(range(0, 100, 10))


@pytest.mark.parametrize(
    ("age", "kept"), [(20, [0, 70, 80, 90]), (1, [0, 90]), (90, [*range(0, 100, 10)])]
)
def test_older_ones_go_but_for_the_first(tmp_path: Path, age: int, kept: list[int]) -> None:
    assert save(tmp_path, range(0, 100, 10), LoggingConfig(rollouts_kept_steps=age)) == kept


def test_what_is_too_much_goes_the_oldest_first(tmp_path: Path) -> None:
    logging = LoggingConfig(rollouts_kept_gib=4500 / 2**30)
    assert save(tmp_path, range(0, 100, 10), logging) == [0, 70, 80, 90]
    tiny = LoggingConfig(rollouts_kept_gib=1 / 2**30)
    assert save(tmp_path, range(100, 120, 10), tiny) == [0, 110]


def test_files_of_other_names_are_nobodys(tmp_path: Path) -> None:
    other = tmp_path / "step-mine.parquet"
    other.write_bytes(b"")
    save(tmp_path, range(0, 50, 10), LoggingConfig(rollouts_kept_steps=1))
    assert other.exists()


def test_steps_of_a_later_life_do_not_count(tmp_path: Path) -> None:
    save(tmp_path, range(0, 100, 10), LoggingConfig())
    remove_old_rollouts(tmp_path, 30, LoggingConfig(rollouts_kept_steps=5))
    kept = [int(path.stem.removeprefix("step-")) for path in saved_rollouts(tmp_path)]
    assert kept == [0, *range(30, 100, 10)]


@pytest.mark.parametrize(
    ("saved", "shown"), [([], []), ([1], [1]), ([1, 2], [1, 2]), (list(range(9)), [0, 4, 8])]
)
def test_the_report_shows_three_steps(saved: list[int], shown: list[int]) -> None:
    assert shown_steps(saved) == shown
