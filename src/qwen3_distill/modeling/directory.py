"""Checks model directories. No torch."""

import json
from pathlib import Path

from qwen3_distill.errors import ModelError

SUPPORTED_MODEL_TYPES = ("qwen3",)


def check_model_dir(path: str | Path, *, weights: bool = True) -> Path:
    """Return the directory if it holds a dense Qwen3 model.

    Args:
        weights: False: its weights may be missing.

    Raises:
        ModelError: it is missing, has no config or weights, or has another architecture.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(
            f"model directory {directory} does not exist (working directory {Path.cwd()}); give "
            "the path of a Hugging Face model directory, or a hub id such as Qwen/Qwen3-4B"
        )
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{directory} has no config.json: not a Hugging Face model directory")
    try:
        model_type = json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{config_file} is not a JSON object: {error}") from error
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ModelError(
            f"{directory}: model_type is {model_type!r}, expected one of "
            f"{', '.join(SUPPORTED_MODEL_TYPES)} (a dense Qwen3 causal language model)"
        )
    if weights and not any(directory.glob("*.safetensors")):
        raise ModelError(f"{directory} has no *.safetensors file: the weights are missing")
    return directory
