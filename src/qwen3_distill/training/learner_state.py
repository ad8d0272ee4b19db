"""Writes and reads the files of a learner's state: trained weights, optimizer, replay."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3_distill.errors import CheckpointError
from qwen3_distill.replay.buffer import ReplayBuffer

_WEIGHTS, _OPTIMIZER, _REPLAY = "weights.safetensors", "optimizer.pt", "replay.safetensors"


def write_state(
    directory: Path,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    replay: ReplayBuffer | None,
) -> None:
    """Write everything that `read_state` returns."""
    weights = {name: tensor.detach().contiguous() for name, tensor in trained.items()}
    save_file(weights, directory / _WEIGHTS)
    torch.save(optimizer.state_dict(), directory / _OPTIMIZER)
    if replay is not None:
        save_file(replay.state_dict(), directory / _REPLAY)


def read_state(
    directory: Path, trained: Mapping[str, Tensor], *, with_replay: bool
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor] | None]:
    """Read trained weights, the optimizer's state and, if wanted, that of replay.

    Raises:
        CheckpointError: a file cannot be read, or the weights are not those that ``trained`` names.
    """
    try:
        saved = load_file(directory / _WEIGHTS)
        state = torch.load(directory / _OPTIMIZER, weights_only=True, map_location="cpu")
        kept = load_file(directory / _REPLAY) if with_replay else None
    except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{directory}: cannot be read: {error}") from error
    if _shapes(saved) != _shapes(trained):
        raise CheckpointError(f"{directory}: holds other parameters than this run trains")
    return saved, state, kept


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
