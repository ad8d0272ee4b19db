"""Writes and reads the files of a learner's state: trained weights, optimizer, replay.

A learner whose weights are whole writes one file of each. Ranks that divide them write a file each
of their rows (``weights-00001-of-00002.safetensors``); what is whole on all of them, and the replay
buffer, is written by the first. Any number of ranks reads either form.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3_distill.errors import CheckpointError
from qwen3_distill.replay.buffer import ReplayBuffer

_WEIGHTS, _OPTIMIZER, _REPLAY = "weights{}.safetensors", "optimizer{}.pt", "replay.safetensors"
_PART = re.compile(r"weights-[0-9]{5}-of-([0-9]{5})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which of ``count`` equal runs of rows a rank holds of the weights that are divided.

    The last runs may be shorter, or empty.
    """

    index: int = 0
    count: int = 1
    divided: frozenset[str] = frozenset()
    """Names of the weights that are divided; the others are whole on every rank."""

    def of(self, name: str, whole: Tensor) -> Tensor:
        """Return what this rank holds of a weight, or of a moment of it, as a view."""
        if name not in self.divided:
            return whole
        size = -(-whole.shape[0] // self.count)
        return whole[self.index * size : (self.index + 1) * size]

    def saves(self, name: str) -> bool:
        return self.index == 0 or name in self.divided


WHOLE = Part()
"""Every weight is whole on this rank."""


def write_state(
    directory: Path,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    replay: ReplayBuffer | None,
    part: Part = WHOLE,
) -> None:
    """Write this rank's files of what `read_state` returns.

    Args:
        trained: what the optimizer steps, in its order.
    """
    suffix = _suffix(part.index, part.count)
    saved = {name: t.detach().contiguous() for name, t in trained.items() if part.saves(name)}
    save_file(saved, directory / _WEIGHTS.format(suffix))
    names, state = list(trained), optimizer.state_dict()
    moments = {i: value for i, value in state["state"].items() if part.saves(names[i])}
    torch.save(state | {"state": moments}, directory / _OPTIMIZER.format(suffix))
    if replay is not None and part.index == 0:
        save_file(replay.state_dict(), directory / _REPLAY)


def read_state(
    directory: Path, shapes: Mapping[str, torch.Size], *, with_replay: bool, part: Part = WHOLE
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor] | None]:
    """Read trained weights, the optimizer's state and, if wanted, that of replay.

    Args:
        shapes: of the whole trained weights, in the optimizer's order.
        part: what is returned of weights and moments, whoever wrote them.

    Raises:
        CheckpointError: a file is missing or cannot be read, or the weights are not those that
            ``shapes`` names.
    """
    try:
        suffixes = _suffixes(directory)
        saved = _read_weights([directory / _WEIGHTS.format(s) for s in suffixes], shapes, part)
        states = [
            torch.load(
                directory / _OPTIMIZER.format(suffix),
                weights_only=True,
                map_location="cpu",
                mmap=True,
            )
            for suffix in suffixes
        ]
        kept = load_file(directory / _REPLAY) if with_replay else None
    except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{directory}: cannot be read: {error}") from error
    if saved is None:
        raise CheckpointError(f"{directory}: holds other parameters than this run trains")
    return saved, _joined_state(states, list(shapes), part), kept


def _suffix(index: int, count: int) -> str:
    return f"-{index + 1:05d}-of-{count:05d}" if count > 1 else ""


def _suffixes(directory: Path) -> list[str]:
    """List what the files of all ranks have behind their names, first rank first."""
    counts = {int(m[1]) for path in directory.iterdir() if (m := _PART.fullmatch(path.name))}
    if len(counts) > 1:
        raise OSError(f"it has files of groups of {sorted(counts)} ranks")
    count = counts.pop() if counts else 1
    return [_suffix(index, count) for index in range(count)]


def _read_weights(
    files: Sequence[Path], shapes: Mapping[str, torch.Size], part: Part
) -> dict[str, Tensor] | None:
    """Read a part of every weight, one whole weight at a time; None: they are others."""
    saved: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        names = [set(handle.keys()) for handle in handles]
        if set().union(*names) != set(shapes):
            return None
        for name, shape in shapes.items():
            rows = [
                h.get_tensor(name) for h, own in zip(handles, names, strict=True) if name in own
            ]
            whole = _joined(rows)
            if whole.shape != shape:
                return None
            saved[name] = part.of(name, whole).clone()
    return saved


def _joined_state(
    states: Sequence[Mapping[str, Any]], names: Sequence[str], part: Part
) -> dict[str, Any]:
    """Join the ranks' optimizer states, and take a part of the moments that are divided."""
    moments: dict[int, dict[str, Tensor]] = {}
    first: Mapping[int, Mapping[str, Tensor]] = states[0]["state"]
    for index, values in first.items():
        found = [state["state"][index] for state in states if index in state["state"]]
        moments[index] = {
            key: part.of(names[index], _joined([of_rank[key] for of_rank in found])).clone()
            if value.dim()
            else value.clone()  # the number of steps
            for key, value in values.items()
        }
    return {**states[0], "state": moments}


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))
