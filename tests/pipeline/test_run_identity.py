"""A checkpoint belongs to one run: a whole one of another run is refused, not taken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.errors import CheckpointError
from qwen3_distill.pipeline.identity import RunIdentity, config_digest
from qwen3_distill.pipeline.run_folder import MAY_CHANGE
from qwen3_distill.utils.files import file_sha256
from tests.pipeline.builders import read_json, run_to_end, tiny_config
from tests.pipeline.test_resume import crash_at
from tests.tiny_models import TinyModels

SETTINGS = {"steps": 3, "checkpoint.every_steps": 1}


@pytest.fixture
def broken_off(tiny_models: TinyModels, tmp_path: Path) -> RunConfig:
    """A run that crashed in step 2, with the checkpoints of steps 1 and 2."""
    config = tiny_config(tiny_models, tmp_path / "run", SETTINGS)
    crash_at(config, 2)
    return config


def foreign_checkpoints(tiny_models: TinyModels, folder: Path, changed: dict[str, Any]) -> Path:
    return crash_at(tiny_config(tiny_models, folder, SETTINGS | changed), 2)


def rewrite_cursor(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a cursor, and its digest with it."""
    cursor, digests = read_json(checkpoint / "cursor.json"), read_json(checkpoint / "files.json")
    change(cursor)
    (checkpoint / "cursor.json").write_text(json.dumps(cursor))
    digests["cursor.json"] = file_sha256(checkpoint / "cursor.json")
    (checkpoint / "files.json").write_text(json.dumps(digests))


def unmark(cursor: dict[str, Any]) -> None:
    """Make a cursor one of an older version."""
    del cursor["run_id"], cursor["config_digest"]


@pytest.mark.parametrize("changed", [{"seed": 7}, {}], ids=["another seed", "another start"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_whole_checkpoint_of_another_run_is_refused(
    broken_off: RunConfig,
    tiny_models: TinyModels,
    tmp_path: Path,
    changed: dict[str, Any],
    step: int,
) -> None:
    others = foreign_checkpoints(tiny_models, tmp_path / "other", changed)
    own, name = broken_off.output_path / "checkpoints", f"step-{step:06d}"
    shutil.rmtree(own / name)
    shutil.copytree(others / name, own / name)
    records = (broken_off.output_path / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=f"{name} is a checkpoint of another run"):
        run_to_end(broken_off)
    assert (broken_off.output_path / "metrics.jsonl").read_bytes() == records
    assert (own / name).exists()


def test_the_marks_of_a_run_stay_over_its_starts(broken_off: RunConfig) -> None:
    folder = broken_off.output_path
    before = read_json(folder / "manifest.json")
    run_to_end(broken_off)
    after = read_json(folder / "manifest.json")
    cursor = read_json(folder / "checkpoints" / "step-000003" / "cursor.json")
    for key in ("run_id", "config_digest"):
        assert before[key] == after[key] == cursor[key]


def test_a_run_of_an_older_version_goes_on(broken_off: RunConfig) -> None:
    folder = broken_off.output_path
    manifest = read_json(folder / "manifest.json")
    unmark(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for checkpoint in (folder / "checkpoints").iterdir():
        rewrite_cursor(checkpoint, unmark)
    run_to_end(broken_off)
    assert read_json(folder / "manifest.json")["starts"][-1]["step"] == 2


def test_a_marked_run_takes_no_unmarked_checkpoint(broken_off: RunConfig) -> None:
    rewrite_cursor(broken_off.output_path / "checkpoints" / "step-000002", unmark)
    with pytest.raises(CheckpointError, match="its run is unknown"):
        run_to_end(broken_off)


def test_a_run_without_its_manifest_goes_on_from_its_own_checkpoints_only(
    broken_off: RunConfig, tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = broken_off.output_path
    (folder / "manifest.json").unlink()
    shutil.copytree(folder, tmp_path / "copy")
    run_to_end(broken_off)
    assert read_json(folder / "manifest.json")["starts"][-1]["step"] == 2
    config = tiny_config(tiny_models, tmp_path / "copy", SETTINGS)
    others = foreign_checkpoints(tiny_models, tmp_path / "other", {"seed": 7})
    shutil.rmtree(tmp_path / "copy" / "checkpoints")
    shutil.copytree(others, tmp_path / "copy" / "checkpoints")
    with pytest.raises(CheckpointError, match="the digest of its run's config is"):
        run_to_end(config)


@pytest.mark.parametrize(
    "change",
    [
        lambda cursor: cursor.update(step=1),
        lambda cursor: cursor.update(step=2.0),
        lambda cursor: cursor.update(prompts_drawn="4"),
        lambda cursor: cursor.update(prompts_drawn=True),
        lambda cursor: cursor.update(prompts_drawn=-1),
        lambda cursor: cursor.update(outstanding=[[1]]),
        lambda cursor: cursor.update(weight_version=None),
        lambda cursor: cursor["weight_version"].update(step=1),
        lambda cursor: cursor.pop("outstanding"),
    ],
)
def test_a_cursor_of_another_form_is_corrupt(
    broken_off: RunConfig, change: Callable[[dict[str, Any]], object]
) -> None:
    rewrite_cursor(broken_off.output_path / "checkpoints" / "step-000002", change)
    warnings: list[str] = []
    run_to_end(broken_off, warnings.append)
    (warning,) = warnings
    assert "step 2 is corrupt" in warning


def test_what_the_digest_of_a_config_depends_on(tiny_models: TinyModels, tmp_path: Path) -> None:
    def digest(folder: str, **changed: Any) -> str:
        return config_digest(tiny_config(tiny_models, tmp_path / folder, changed), MAY_CHANGE)

    same = digest("a", steps=2)
    assert digest("b", steps=9, **{"checkpoint.every_steps": 7}) == same
    assert digest("a", seed=0) == same  # a default that is written out
    assert digest("a", seed=1) != same
    assert digest("a", **{"training.optimizer.learning_rate": 0.5}) != same


def test_two_new_identities_differ() -> None:
    assert RunIdentity.new("x") != RunIdentity.new("x")
