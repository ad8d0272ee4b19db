"""Probing packed sequences and shared prompts, and recomputing layers, in a model that any library
prepared."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwen3_distill.errors import EngineStartError
from qwen3_distill.training.batching import SharedPrompt
from qwen3_distill.training.gradient_probe import gradient_gap, layers_as_they_are, probe

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
"""Rows of sequences that differ, and rows of those that are alike: both ways of attention."""

PackedForward: TypeAlias = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""From input ids [1, T], positions [1, T] and the lengths of the sequences to [1, T, D]."""


SharedForward: TypeAlias = Callable[[Tensor, Tensor, Sequence[SharedPrompt]], Tensor]
"""From input ids [1, T], positions [1, T] and where prompts and answers stand to [1, T, D]."""


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
    """How far rows of several sequences are from the same sequences by themselves.

    Rounding gives 1e-6 in float32. Sequences that see one another give about 1.
    """

    hidden: float
    """Largest difference of hidden states, over the largest hidden state."""
    gradient: float
    """`gradient_gap` of the two."""

    def __str__(self) -> str:
        return f"{self.hidden:.1e} of the largest value, and its gradient by {self.gradient:.1e}"

    def exceeds(self, limit: "Gap") -> bool:
        """Whether rows are not the sequences; numbers that are not finite are not either."""
        return not (self.hidden <= limit.hidden and self.gradient <= limit.gradient)


def packing_gap(core: PreTrainedModel, packed_forward: PackedForward) -> Gap:
    """Compute the largest gaps between packed sequences and single ones."""
    gaps, device = list[Gap](), core.device
    for lengths in _PROBE_LENGTHS:
        rows = _random_rows(core, lengths)
        packed_1T = torch.cat(rows, dim=1).to(device)
        positions_1T = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).to(device)
        gaps.append(
            _gap(
                core,
                lambda ids=packed_1T, at=positions_1T, n=lengths: packed_forward(ids, at, n),
                lambda rows=rows: torch.cat([_alone(core, row) for row in rows], dim=1),
            )
        )
    return _largest(gaps)


def shared_prompts_gap(core: PreTrainedModel, shared_forward: SharedForward) -> Gap:
    """Compute the largest gaps between answers behind a shared prompt and single sequences."""
    return _largest([_shared_gap(core, shared_forward, groups) for groups in _PROBE_PROMPTS])


def _shared_gap(
    core: PreTrainedModel, shared_forward: SharedForward, groups: Sequence[SharedPrompt]
) -> Gap:
    tokens, positions = list[Tensor](), list[Tensor]()
    singles = list[tuple[Tensor, int]]()  # and how many of its first tokens count elsewhere
    for group in groups:
        (prompt_1P,) = _random_rows(core, [group.prompt_tokens])
        tokens.append(prompt_1P)
        positions.append(torch.arange(group.prompt_tokens))
        singles.append((prompt_1P, 0))
        for answer_1A in _random_rows(core, group.answer_tokens):
            tokens.append(answer_1A)
            positions.append(group.prompt_tokens + torch.arange(answer_1A.shape[1]))
            singles.append((torch.cat([prompt_1P, answer_1A], dim=1), group.prompt_tokens))
    ids_1T = torch.cat(tokens, dim=1).to(core.device)
    positions_1T = torch.cat(positions).unsqueeze(0).to(core.device)
    return _gap(
        core,
        lambda: shared_forward(ids_1T, positions_1T, groups),
        lambda: torch.cat([_alone(core, row)[:, known:] for row, known in singles], dim=1),
    )


def _random_rows(core: PreTrainedModel, lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = core.config.vocab_size
    return [torch.randint(vocabulary, (1, n), generator=generator) for n in lengths]


def _alone(core: PreTrainedModel, row_1T: Tensor) -> Tensor:
    return core.model(input_ids=row_1T.to(core.device), use_cache=False)[0]


def _gap(core: PreTrainedModel, together: Callable[[], Tensor], alone: Callable[[], Tensor]) -> Gap:
    """Compare what two ways of computing [1, T, D] give."""
    found = probe(core, together)
    with layers_as_they_are():  # to compile them for rows of their own takes too long
        expected = probe(core, alone)
    hidden = (found.hidden - expected.hidden).abs().max() / expected.hidden.abs().max()
    return Gap(float(hidden), gradient_gap(found, expected))


def _largest(gaps: Sequence[Gap]) -> Gap:
    largest = torch.tensor(gaps, dtype=torch.float64).amax(dim=0)  # NaN if one is, unlike `max`
    return Gap(*largest.tolist())
