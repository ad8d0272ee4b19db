"""Reads single tensors of a model directory when they are asked for."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen3_distill.errors import ModelError
from qwen3_distill.modeling.directory import weight_files
from qwen3_distill.modeling.weight_headers import stored_headers


class StoredWeights:
    """The weights in a model directory's files, by name.

    The files are mapped, not read: a tensor costs memory while somebody holds it.

    Raises:
        ModelError: a file is damaged.
    """

    def __init__(self, model_dir: Path) -> None:
        self._directory = model_dir
        self._file_of: dict[str, Path] = {}
        stored_headers(model_dir)  # refuses what two files hold
        for file in weight_files(model_dir):
            try:
                with safe_open(file, framework="pt") as handle:
                    self._file_of.update(dict.fromkeys(handle.keys(), file))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file} cannot be loaded: {error}; fetch it again") from error

    def load(self, name: str, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Read one tensor.

        Raises:
            ModelError: there is none of this name, or its file is damaged.
        """
        file = self._file_of.get(name)
        if file is None:
            raise ModelError(f"{self._directory}: has no weight {name}; fetch the model again")
        try:
            with safe_open(file, framework="pt") as handle:
                return handle.get_tensor(name).to(device=device, dtype=dtype)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be loaded: {error}; fetch it again") from error
