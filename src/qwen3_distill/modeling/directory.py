"""Checks model directories. No torch."""

from pathlib import Path

from qwen3_distill.errors import ModelError
from qwen3_distill.modeling.config_file import CONFIG, read_json_object, rope_parameters

SUPPORTED_MODEL_TYPES = ("qwen3",)


def check_model_dir(path: str | Path, *, weights: bool = True) -> Path:
    """Return the directory if it holds a dense Qwen3 model.

    Args:
        weights: False: its weights may be missing.

    Raises:
        ModelError: it is missing, has no config or weights, or has another architecture; or its
            config can be read in two ways.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(
            f"model directory {directory} does not exist (working directory {Path.cwd()}); give "
            "the path of a Hugging Face model directory, or a hub id such as Qwen/Qwen3-4B"
        )
    config_file = directory / CONFIG
    if not config_file.is_file():
        raise ModelError(f"{directory} has no config.json: not a Hugging Face model directory")
    config = read_json_object(config_file)
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ModelError(
            f"{directory}: model_type is {model_type!r}, expected one of "
            f"{', '.join(SUPPORTED_MODEL_TYPES)} (a dense Qwen3 causal language model)"
        )
    if weights and not any(directory.glob("*.safetensors")):
        raise ModelError(f"{directory} has no *.safetensors file: the weights are missing")
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"{directory} has an adapter_config.json: transformers would load the adapter's base "
            "model in place of this one; merge the adapter, or move its files elsewhere"
        )
    rope_parameters(config, config_file)
    return directory
