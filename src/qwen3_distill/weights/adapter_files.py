"""Adapters as directories in peft's layout."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from qwen3_distill.errors import WeightVersionError
from qwen3_distill.ports import LoraWeights, WeightPayload
from qwen3_distill.types import WeightVersion

_TENSORS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


def write_adapter(version: WeightVersion, payload: WeightPayload, folder: Path) -> Path:
    """Write adapters below ``folder`` and return their directory, which is named by the version.

    Of the versions in ``folder``, the newest two are kept.

    Raises:
        WeightVersionError: ``payload`` is whole weights.
    """
    if not isinstance(payload, LoraWeights):
        raise WeightVersionError(f"{version} was published as whole weights, not as adapters")
    directory = folder / version_name(version)
    directory.mkdir(parents=True, exist_ok=True)
    save_adapter(payload, directory)
    keep_newest(folder, 2)
    return directory


def save_adapter(payload: LoraWeights, directory: Path) -> None:
    """Write tensors and configuration into a directory that exists."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in payload.tensors.items()}
    save_file(tensors, directory / _TENSORS)
    (directory / _CONFIG).write_text(json.dumps(_peft_config(payload), indent=1) + "\n")


def has_adapter(directory: Path) -> bool:
    return (directory / _TENSORS).is_file()


def load_adapter(directory: Path) -> LoraWeights:
    """Read `save_adapter`'s files."""
    config = json.loads((directory / _CONFIG).read_text())
    return LoraWeights(
        tensors=load_file(directory / _TENSORS),
        rank=config["r"],
        alpha=config["lora_alpha"],
        target_modules=tuple(config["target_modules"]),
    )


def version_name(version: WeightVersion) -> str:
    """The name of a version's directory."""
    return f"step-{version.step:06d}-{version.digest}"


def keep_newest(root: Path, count: int) -> None:
    """Remove all versions' directories but the newest ``count``."""
    by_age = sorted(root.glob("step-*"), key=lambda path: path.stat().st_mtime_ns)
    for path in by_age[:-count]:
        shutil.rmtree(path, ignore_errors=True)


def _peft_config(payload: LoraWeights) -> Mapping[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": payload.rank,
        "lora_alpha": payload.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(payload.target_modules),
        "inference_mode": True,
    }
