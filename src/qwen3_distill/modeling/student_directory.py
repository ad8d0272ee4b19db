"""Writes a trained student: its source's directory with other weights.

No library writes the source's files again, since a library keeps what it knows and drops the rest.
They are read before the training, so that afterwards only the disk can fail.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor

from qwen3_distill.errors import ModelError, RunFolderError
from qwen3_distill.modeling.config_file import (
    CONFIG,
    read_json_object,
    rope_parameters,
    spelled_for_both,
)
from qwen3_distill.modeling.directory import check_model_dir
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.modeling.weight_headers import check_weight_headers, stored_headers
from qwen3_distill.utils.files import sync
from qwen3_distill.utils.json_text import parse_json

_WEIGHTS_AND_STATES = frozenset(
    f".{suffix}"
    for suffix in (
        *("safetensors", "bin", "pt", "pth", "ckpt", "distcp", "pkl", "pickle", "gguf", "ggml"),
        *("h5", "msgpack", "onnx", "ot", "npz", "npy", "index", "tflite", "mlmodel", "engine"),
    )
)
"""Weights and training states, in any format: those of another model than the student."""
_OTHER_DATA = frozenset(
    f".{suffix}"
    for suffix in (
        *("zip", "gz", "tar", "tgz", "zst", "7z", "parquet", "arrow", "jsonl", "csv", "log"),
        *("png", "jpg", "jpeg", "gif", "svg", "webp", "pdf", "mp4"),
    )
)
"""Archives, data and pictures: no reader of a model opens them."""
_NOT_THE_STUDENTS = frozenset({CONFIG, "trainer_state.json"})
"""Written anew, and how the source was trained."""
_READ_AS_JSON = re.compile(
    r"tokenizer\.json|vocab\.json|added_tokens\.json|special_tokens_map\.json|chat_template\.json|"
    r".*_config\.json"
)
"""Files that every reader parses."""
_MAX_BYTES = 256 << 20
"""A larger file is no tokenizer, template or config."""
_FOLDERS = ("additional_chat_templates",)
"""Folders of a model directory that belong to its tokenizer."""


@dataclass(frozen=True)
class StudentFiles:
    """The content of a student's source, without the weights."""

    config_file: Path
    config: Mapping[str, Any]
    """The content of ``config.json``."""
    unchanged: Mapping[str, bytes]
    """Contents by name: what `write_student` copies byte for byte."""

    def check_tied(self, tied: bool) -> None:
        """Check that the loaded model ties its output head as the config says.

        transformers 5 leaves the two apart where both are stored and differ; other readers do not.

        Raises:
            ModelError: it does not.
        """
        stated = bool(self.config.get("tie_word_embeddings", False))
        if stated != tied:
            raise ModelError(
                f"{self.config_file}: tie_word_embeddings is {str(stated).lower()}, but the stored "
                f"output head and embedding are {'one matrix' if tied else 'two matrices'}; set it "
                f"to {str(tied).lower()}, or restore the weights"
            )


def read_student_files(model_dir: str | Path, *, weights: bool = True) -> StudentFiles:
    """Read everything of a model directory that the trained student takes over.

    That is every file but weights, training states, archives, pictures, hidden files and the model
    card, which describes the source. Of folders only additional chat templates.

    Args:
        weights: False: the weights may be missing.

    Raises:
        ModelError: a file cannot be read, or the model cannot be trained.
    """
    directory = check_model_dir(model_dir, weights=weights)
    file = directory / CONFIG
    config = read_json_object(file)
    rope_parameters(config, file)
    if config.get("quantization_config") is not None:
        raise ModelError(
            f"{file}: the weights are quantized (quantization_config), and a student is trained in "
            "bfloat16 or float32; give the model's unquantized directory"
        )
    folders = [directory, *(directory / name for name in _FOLDERS)]
    unchanged: dict[str, bytes] = {}
    try:
        for folder in filter(Path.is_dir, folders):
            for path in sorted(filter(_is_taken_over, folder.iterdir())):
                unchanged[path.relative_to(directory).as_posix()] = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{error.filename or directory} cannot be read: {error.strerror}; the trained student "
            "takes it over: restore it, or remove it"
        ) from error
    for name, content in unchanged.items():
        if _READ_AS_JSON.fullmatch(name):
            _require_json_object(directory / name, content)
    return StudentFiles(config_file=file, config=config, unchanged=unchanged)


def check_student(model_dir: str | Path, *, weights: bool = True) -> None:
    """Read everything that a run reads of its student, except for the weights themselves.

    Args:
        weights: False: the weights may be missing.

    Raises:
        ModelError: something is missing, damaged or contradictory.
    """
    read_student_files(model_dir, weights=weights)
    load_identity(model_dir, weights=weights)
    if weights:
        check_weight_headers(Path(model_dir))


def stored_shapes(model_dir: str | Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a directory's weights from the heads of its files.

    Raises:
        ModelError: a file is damaged.
    """
    return {name: header.shape for name, header in stored_headers(Path(model_dir)).items()}


def write_student(files: StudentFiles, weights: dict[str, Tensor], directory: Path) -> None:
    """Write the student whole or not at all; in a directory that exists, replace its files.

    Args:
        weights: by the plain model's names, on the CPU.

    Raises:
        RunFolderError: it cannot be written.
    """
    final = Path(os.path.abspath(directory))  # so that "." has a name too
    temporary = final.with_name(f".unfinished-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(files, weights, temporary)
        _move(temporary, final)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(
            f"cannot write {directory}: {error}; free space, then start the same command again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(files: StudentFiles, weights: dict[str, Tensor], directory: Path) -> None:
    for name, content in files.unchanged.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = spelled_for_both(dict(files.config), files.config_file, dtype)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")
    save_torch_state_dict(weights, directory, metadata={"format": "pt"})
    mode = (directory / CONFIG).stat().st_mode
    for path in directory.glob("*.safetensors"):  # which safetensors lets nobody else read
        path.chmod(mode)


def _move(temporary: Path, final: Path) -> None:
    """Give the finished directory its name; move its files one by one where there is one."""
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    if not final.exists():
        temporary.rename(final)
    else:
        for path in temporary.rglob("*"):
            if path.is_file():
                target = final / path.relative_to(temporary)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
        sync(final)
    sync(final.parent)


def _is_taken_over(path: Path) -> bool:
    name = path.name.lower()
    if name.startswith(".") or path.suffix.lower() in _WEIGHTS_AND_STATES | _OTHER_DATA:
        return False
    if name in _NOT_THE_STUDENTS or name.startswith("readme") or name.endswith(".index.json"):
        return False
    found = path.stat()
    return stat.S_ISREG(found.st_mode) and found.st_size <= _MAX_BYTES


def _require_json_object(file: Path, content: bytes) -> None:
    try:
        value = parse_json(content)
    except ValueError as error:
        raise ModelError(
            f"{file} is not a JSON object: {error}; the trained student takes the file over: "
            "restore it, or remove it"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{file} is a JSON {type(value).__name__}, expected an object; the trained student "
            "takes the file over: restore it, or remove it"
        )
