"""A disk that cannot hold what a run will write is named before the run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen3_distill.errors import RunFolderError
from qwen3_distill.pipeline.disk_space import check_run_space, student_bytes
from tests.pipeline.builders import call_cli, refused, tiny_config, tiny_values, write_config
from tests.tiny_models import TinyModels, write_model

LORA = {"kind": "lora", "rank": 4, "alpha": 8, "target_modules": ["q_proj"]}


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that sets the free bytes of every disk."""

    def set_to(num_bytes: int) -> None:
        usage = SimpleNamespace(free=num_bytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage if path.is_dir() else None)

    return set_to


def test_student_bytes_are_those_of_its_file(tiny_models: TinyModels, tmp_path: Path) -> None:
    for model, tied in ((tiny_models.student, True), (tiny_models.teacher, False)):
        changes = {"student": {"model": str(model)}}
        weights = student_bytes(tiny_config(tiny_models, tmp_path / "run", changes))
        in_file = (model / "model.safetensors").stat().st_size
        assert 0 < in_file - weights < 8_000, tied  # the file's head
        half = changes | {"training.dtype": "bfloat16"}
        assert student_bytes(tiny_config(tiny_models, tmp_path / "run", half)) == weights // 2


@pytest.mark.parametrize(
    ("tuning", "steps", "checkpoint", "student", "trained"),
    [
        ({"kind": "full"}, 1, {"every_steps": 9}, 1, 1),  # one checkpoint, then the student
        ({"kind": "full"}, 8, {"every_steps": 2, "keep_last": 2}, 0, 3),  # one more for a while
        (LORA, 8, {"every_steps": 2, "keep_last": 2}, 1, 2),
    ],
)
def test_the_largest_need_is_what_must_be_free(
    tuning: dict[str, Any],
    steps: int,
    checkpoint: dict[str, int],
    student: int,
    trained: int,
    tiny_models: TinyModels,
    tmp_path: Path,
    free: Callable[[int], None],
) -> None:
    changes = {"training.tuning": tuning, "steps": steps, "checkpoint": checkpoint}
    config = tiny_config(tiny_models, tmp_path / "a" / "run", changes)
    size = student_bytes(config)
    # Two layers' query projections: 64 outputs and 32 inputs each, at rank 4.
    one = 12 * 2 * 4 * (64 + 32) if tuning is LORA else 3 * size
    needed = student * size + trained * one
    free(needed)
    check_run_space(config)
    free(needed - 1)
    with pytest.raises(RunFolderError, match=r"run: the student needs .* free; free space"):
        check_run_space(config)
    folder = config.output_path / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "x").write_bytes(b"1")  # of an earlier start
    check_run_space(config)


@pytest.mark.parametrize("tuning", [{"kind": "full"}, LORA], ids=["full", "lora"])
def test_the_need_is_known_before_weights_are_downloaded(
    tuning: dict[str, Any],
    tiny_models: TinyModels,
    tmp_path: Path,
    free: Callable[[int], None],
) -> None:
    for source in (tiny_models.student, tiny_models.teacher):
        changes = {"student.model": str(source), "training.tuning": tuning}
        whole = tiny_config(tiny_models, tmp_path / "run", changes)
        without = shutil.copytree(source, tmp_path / source.name)
        (without / "model.safetensors").unlink()
        changes = changes | {"student.model": str(without)}
        config = tiny_config(tiny_models, tmp_path / "run", changes)
        assert student_bytes(config) == student_bytes(whole)
        free(3 * student_bytes(whole) if tuning is not LORA else student_bytes(whole))
        with pytest.raises(RunFolderError) as expected:
            check_run_space(whole)
        with pytest.raises(RunFolderError) as found:
            check_run_space(config)
        assert str(found.value) == str(expected.value)


def test_a_tied_head_that_is_stored_counts_once(tiny_models: TinyModels, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", seed=0, tie_word_embeddings=False)
    changes = {"student": {"model": str(model)}}
    untied = student_bytes(tiny_config(tiny_models, tmp_path / "run", changes))
    file = model / "config.json"
    file.write_text(
        file.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    tied = student_bytes(tiny_config(tiny_models, tmp_path / "run", changes))
    assert untied - tied == 260 * 32 * 4


@pytest.mark.parametrize("command", [("run",), ("config", "check")])
def test_a_full_disk_ends_before_the_run(
    command: tuple[str, ...],
    tiny_models: TinyModels,
    tmp_path: Path,
    free: Callable[[int], None],
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_values(tiny_models, tmp_path / "run"))
    assert call_cli("config", "check", "--config", config).code == 0
    free(1000)
    refused(*command, "--config", config, words=["the student needs", "GiB free", "output_dir"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
