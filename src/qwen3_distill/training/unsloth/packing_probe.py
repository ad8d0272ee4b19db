"""Probing packed sequences and shared prompts, and recomputing layers, in a model that any library
prepared."""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwen3_distill.errors import EngineStartError
from qwen3_distill.training.batching import SharedPrompt
from qwen3_distill.training.gradient_probe import gradient_gap, probe
from qwen3_distill.training.unsloth.compiled_layers import compiler_errors, uncompiled_layers

_PROBE_LENGTHS = ((19, 7, 12), (17, 17))
_PROBE_PROMPTS = (
    (
        SharedPrompt(start=0, prompt_tokens=9, answer_tokens=(12, 5, 7)),
        SharedPrompt(start=33, prompt_tokens=4, answer_tokens=(6, 6)),
    ),
    (
        SharedPrompt(start=0, prompt_tokens=9, answer_tokens=(8, 8)),
        SharedPrompt(start=25, prompt_tokens=9, answer_tokens=(8, 8)),
    ),
)
"""Rows of sequences that differ, and of those that are alike: attention may take another way."""

PackedForward: TypeAlias = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""From input ids [1, T], positions [1, T] and the lengths of the sequences to [1, T, D]."""

SharedForward: TypeAlias = Callable[[Tensor, Tensor, Sequence[SharedPrompt]], Tensor]
"""From input ids [1, T], positions [1, T] and where prompts and answers stand to [1, T, D]."""
_Forward: TypeAlias = Callable[[], Tensor]


def recompute_first_layers(core: PreTrainedModel, count: int) -> None:
    """Let only the first layers recompute in the backward pass.

    Raises:
        EngineStartError: checkpointing was not enabled on the model before.
    """
    for index, layer in enumerate(core.model.layers):
        if index >= count:
            layer.gradient_checkpointing = False
        elif not layer.gradient_checkpointing:
            raise EngineStartError(
                f"layer {index} cannot be recomputed: checkpointing was not enabled when the model "
                "was loaded; set training.gradient_checkpointing=off"
            )


class Gap(NamedTuple):
    """Holds how far rows of several sequences are from the same sequences by themselves.

    Rounding gives 1e-6 in float32. Sequences that see one another give about 1.
    """

    hidden: float
    """Largest difference of hidden states, over the largest hidden state."""
    gradient: float
    """Their `gradient_gap`."""

    def __str__(self) -> str:
        return f"{self.hidden:.1e} of the largest value, and its gradient by {self.gradient:.1e}"

    def exceeds(self, limit: "Gap") -> bool:
        """Tell whether it is above a limit, or not finite."""
        return not (self.hidden <= limit.hidden and self.gradient <= limit.gradient)


def packing_gap(
    core: PreTrainedModel, packed_forward: PackedForward, *, compiles: bool = False
) -> Gap:
    """Compute the largest gaps between packed sequences and single ones.

    Args:
        compiles: our attention is in layers that are compiled, and a compiler that fails an error.
    """
    draw = _RandomRows(core)
    gaps = [
        _gap(core, *_packed_and_alone(core, packed_forward, draw, lengths), compiles=compiles)
        for lengths in _PROBE_LENGTHS
    ]
    return _largest(gaps)


def shared_prompts_gap(
    core: PreTrainedModel, shared_forward: SharedForward, *, compiles: bool = False
) -> Gap:
    """Compute the largest gaps between answers behind a shared prompt and single sequences.

    Args:
        compiles: as of `packing_gap`.
    """
    draw = _RandomRows(core)
    gaps = [
        _gap(core, *_shared_and_alone(core, shared_forward, draw, groups), compiles=compiles)
        for groups in _PROBE_PROMPTS
    ]
    return _largest(gaps)


class _RandomRows:
    """Draws rows of tokens that all differ: of equal ones a mix-up would not show."""

    def __init__(self, core: PreTrainedModel) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._core = core

    def __call__(self, length: int) -> Tensor:
        """Return [1, length] token ids."""
        vocab_size: int = self._core.config.vocab_size
        ids_1T = torch.randint(vocab_size, (1, length), generator=self._generator)
        return ids_1T.to(self._core.device)


def _packed_and_alone(
    core: PreTrainedModel, forward: PackedForward, draw: _RandomRows, lengths: Sequence[int]
) -> tuple[_Forward, _Forward]:
    rows = [draw(length) for length in lengths]
    ids_1T = torch.cat(rows, dim=1)
    positions_1T = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).to(core.device)
    return (
        lambda: forward(ids_1T, positions_1T, lengths),
        lambda: torch.cat([_alone(core, row) for row in rows], dim=1),
    )


def _shared_and_alone(
    core: PreTrainedModel,
    forward: SharedForward,
    draw: _RandomRows,
    groups: Sequence[SharedPrompt],
) -> tuple[_Forward, _Forward]:
    tokens, positions = list[Tensor](), list[Tensor]()
    singles = list[tuple[Tensor, int]]()  # and how many of its first tokens count elsewhere
    for group in groups:
        prompt_1P = draw(group.prompt_tokens)
        tokens.append(prompt_1P)
        positions.append(torch.arange(group.prompt_tokens))
        singles.append((prompt_1P, 0))
        for answer_1A in map(draw, group.answer_tokens):
            tokens.append(answer_1A)
            positions.append(group.prompt_tokens + torch.arange(answer_1A.shape[1]))
            singles.append((torch.cat([prompt_1P, answer_1A], dim=1), group.prompt_tokens))
    ids_1T = torch.cat(tokens, dim=1)
    positions_1T = torch.cat(positions).unsqueeze(0).to(core.device)
    return (
        lambda: forward(ids_1T, positions_1T, groups),
        lambda: torch.cat([_alone(core, row)[:, known:] for row, known in singles], dim=1),
    )


def _alone(core: PreTrainedModel, row_1T: Tensor) -> Tensor:
    return core.model(input_ids=row_1T, use_cache=False)[0]


def _gap(core: PreTrainedModel, together: _Forward, alone: _Forward, *, compiles: bool) -> Gap:
    """Compare what two ways of computing [1, T, D] give."""
    with compiler_errors() if compiles else contextlib.nullcontext():
        found = probe(core, together)
    with uncompiled_layers():  # to compile them for rows of their own takes too long
        expected = probe(core, alone)
    hidden = (found.hidden - expected.hidden).abs().max() / expected.hidden.abs().max()
    return Gap(float(hidden), gradient_gap(found, expected))


def _largest(gaps: Sequence[Gap]) -> Gap:
    largest = torch.tensor(gaps, dtype=torch.float64).amax(dim=0)  # NaN if one is, unlike `max`
    return Gap(*largest.tolist())
