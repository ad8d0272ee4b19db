"""Checks before a run that its disk can hold what the run will write."""

import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qwen3_distill.config import LoraTuning, RunConfig
from qwen3_distill.errors import ModelError, RunFolderError
from qwen3_distill.modeling.config_file import CONFIG, read_json_object
from qwen3_distill.modeling.hub import missing_weights
from qwen3_distill.modeling.loading import resolve_dtype
from qwen3_distill.modeling.shapes import ModelShape, read_shape
from qwen3_distill.modeling.student_directory import stored_shapes
from qwen3_distill.recording.text import gibibytes

_ADAPTER_BYTES = 4
"""Adapters are float32, whatever the model's precision."""
_WITH_MOMENTS = 3
"""A checkpoint holds each trained parameter and two moments of AdamW."""


def check_run_space(config: RunConfig) -> tuple[int, int]:
    """Check that checkpoints and ``student/`` fit, counting what an earlier start wrote as free.

    Returns:
        Bytes that are needed, and those that are free.

    Raises:
        RunFolderError: they do not, or a file has the name of one of their folders.
    """
    folder = config.output_path
    for place in (folder / "student", folder / "checkpoints"):
        if place.exists() and not place.is_dir():
            raise RunFolderError(f"{place} is a file; choose another output_dir, or move the file")
    student = student_bytes(config)
    one, kept = _checkpoint_bytes(config), config.checkpoint.keep_last
    saved = math.ceil(config.steps / config.checkpoint.every_steps)
    # A checkpoint is written before the oldest one goes; the student when all are there.
    needed = max(min(saved, kept + 1) * one, min(saved, kept) * one + student)
    written = _bytes_below(folder / "checkpoints") + _bytes_below(folder / "student")
    return require_space(
        folder,
        needed - written,
        f"the student needs {gibibytes(student, 2)} and each of its {min(saved, kept)} checkpoints "
        f"{gibibytes(one, 2)}",
        "free space, choose another output_dir, or keep fewer checkpoints (checkpoint.keep_last)",
    )


def check_student_space(config: RunConfig, out: Path) -> None:
    """Check that a student alone fits where ``out`` will be.

    Raises:
        RunFolderError: it does not.
    """
    needed = student_bytes(config)
    advice = "free space or choose another directory"
    require_space(out, needed, f"the student needs {gibibytes(needed, 2)}", advice)


def check_download_space(models: Sequence[str]) -> tuple[int, int]:
    """Check that the weights of models of the hub fit where their other files are.

    Args:
        models: directories in the hub's cache, without weights.

    Returns:
        Bytes that are needed, and those that are free.

    Raises:
        RunFolderError: they do not.
    """
    needed = sum(_download_bytes(read_shape(model)) for model in models)
    advice = "free space, or let HF_HOME name a folder on another disk"
    what = f"the weights that are to be downloaded need {gibibytes(needed)}"
    return require_space(Path(models[0]), needed, what, advice)


def _download_bytes(shape: ModelShape) -> int:
    """Bytes of a checkpoint as Qwen publishes it: bfloat16, or FP8 with bfloat16 embeddings."""
    return shape.fp8_weight_bytes(2) if shape.fp8_checkpoint else shape.weight_bytes(2)


def student_bytes(config: RunConfig) -> int:
    """Bytes of the trained student's weights."""
    itemsize = resolve_dtype(config.training.dtype).itemsize
    if (shape := _shape_before_download(config)) is not None:
        return itemsize * shape.num_parameters
    return itemsize * sum(map(math.prod, _trained_shapes(config).values()))


def _checkpoint_bytes(config: RunConfig) -> int:
    tuning = config.training.tuning
    if not isinstance(tuning, LoraTuning):
        return _WITH_MOMENTS * student_bytes(config)
    if (shape := _shape_before_download(config)) is not None:
        adapter = shape.lora_parameters(tuning.rank, tuning.target_modules)
        return _WITH_MOMENTS * _ADAPTER_BYTES * adapter
    parameters = sum(
        tuning.rank * sum(shape)
        for name, shape in _trained_shapes(config).items()
        if name.split(".")[-2] in tuning.target_modules
    )
    return _WITH_MOMENTS * _ADAPTER_BYTES * parameters


def _shape_before_download(config: RunConfig) -> ModelShape | None:
    """The student's shape where its weights are still to be downloaded, if its config has it all.

    A run checks again when they are there.
    """
    with suppress(ModelError):
        if missing_weights(config.student.model):
            return read_shape(config.student.model)
    return None


def _trained_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters; a tied output head counts once, also where it is stored."""
    tied = read_json_object(Path(config.student.model) / CONFIG).get("tie_word_embeddings", False)
    prefixes = ("model.",) if tied else ("model.", "lm_head.")
    shapes = stored_shapes(config.student.model)
    return {name: shape for name, shape in shapes.items() if name.startswith(prefixes)}


def require_space(path: Path, needed: int, what: str, advice: str) -> tuple[int, int]:
    """Check that bytes fit on the disk where ``path`` is or will be.

    Args:
        what: says what needs them.
        advice: says what can be done where they do not fit.

    Returns:
        ``needed``, and the bytes that are free.

    Raises:
        RunFolderError: they do not fit.
    """
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise RunFolderError(
            f"{path}: {what}, but its disk has {gibibytes(free, 2)} free; {advice}"
        )
    return needed, free


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
