"""A weight channel through files, and weight versions that come from a model directory."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3_distill.errors import EngineError, WeightVersionError
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.ports import FullWeights, LoraWeights, WeightChannel, WeightPayload
from qwen3_distill.types import WeightVersion

_FULL = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"


class DirectoryChannel:
    """Versions as directories under ``root``: peft's layout for adapters, safetensors for all else.

    A version is written under another name, flushed and renamed: it is there whole or not at all.
    The newest two are kept, so that an engine may still read the one it serves. On a memory file
    system (``/dev/shm``) nothing touches a disk. May be pickled: it is no more than its path.
    """

    crosses_processes = True

    def __init__(self, root: Path) -> None:
        self._root = root

    def publish(self, version: WeightVersion, payload: WeightPayload) -> None:
        try:
            self._write(version, payload)
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"{version} cannot be written to {self._root}: {error}; make room there (the "
                "/dev/shm of a container is as large as its --shm-size)"
            ) from error

    def _write(self, version: WeightVersion, payload: WeightPayload) -> None:
        final = self.locate(version)
        temporary = self._root / f".unfinished-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {
            name: tensor.detach().contiguous().cpu() for name, tensor in payload.tensors.items()
        }
        if isinstance(payload, LoraWeights):
            save_file(tensors, temporary / _ADAPTER)
            text = json.dumps(_peft_config(payload), indent=1) + "\n"
            (temporary / _ADAPTER_CONFIG).write_text(text)
        else:
            save_file(tensors, temporary / _FULL)
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _flush(self._root)
        self._drop_all_but(2)

    def fetch(self, version: WeightVersion) -> WeightPayload:
        directory = self.locate(version)
        try:
            if (directory / _ADAPTER).is_file():
                config = json.loads((directory / _ADAPTER_CONFIG).read_text())
                return LoraWeights(
                    tensors=load_file(directory / _ADAPTER),
                    rank=config["r"],
                    alpha=config["lora_alpha"],
                    target_modules=tuple(config["target_modules"]),
                )
            return FullWeights(tensors=load_file(directory / _FULL))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise WeightVersionError(
                f"the channel {self._root} does not hold {version}; publish it first ({error})"
            ) from error

    def locate(self, version: WeightVersion) -> Path:
        """The directory of a version, there or not."""
        return self._root / f"step-{version.step:06d}-{version.digest}"

    def _drop_all_but(self, count: int) -> None:
        by_age = sorted(self._root.glob("step-*"), key=lambda path: path.stat().st_mtime_ns)
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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_directory(
    model_dir: str | Path, channel: WeightChannel, *, dtype: torch.dtype
) -> WeightVersion:
    """Publish the weights of a Hugging Face directory as step 0."""
    model = load_model(model_dir, device=torch.device("cpu"), dtype=dtype)
    weights: dict[str, Tensor] = dict(model.named_parameters())
    version = WeightVersion(step=0, digest=weights_digest(weights))
    channel.publish(version, FullWeights(tensors=weights))
    return version
