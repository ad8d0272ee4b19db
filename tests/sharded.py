"""Weights of a checkpoint in several files."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of the files that the index names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: dict[str, Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        found |= load_file(folder / name)
    assert found.keys() == index["weight_map"].keys()
    return found
