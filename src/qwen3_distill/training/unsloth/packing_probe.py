"""Probing packed sequences and shared prompts, and recomputing layers, in a model that any library
prepared."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwen3_distill.errors import EngineStartError
from qwen3_distill.training.batching import SharedPrompt

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


@torch.no_grad()
def packing_gap(core: PreTrainedModel, packed_forward: PackedForward) -> float:
    """Largest difference of hidden states between packed and single sequences, over the largest.

    Rounding gives 1e-6 in float32. Sequences that see one another give about 1.
    """
    gaps, device = list[float](), core.device
    with _without_dropout(core):
        for lengths in _PROBE_LENGTHS:
            rows = _random_rows(core, lengths)
            packed_1T = torch.cat(rows, dim=1)
            positions_1T = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
            together_1TD = packed_forward(packed_1T.to(device), positions_1T.to(device), lengths)
            gaps.append(_gap(together_1TD, torch.cat([_alone(core, row) for row in rows], dim=1)))
    return max(gaps)


@torch.no_grad()
def shared_prompts_gap(core: PreTrainedModel, shared_forward: SharedForward) -> float:
    """Largest difference of hidden states between answers behind a shared prompt and sequences by
    themselves, over the largest.

    Rounding gives 1e-6 in float32. Answers that see one another give about 1.
    """
    with _without_dropout(core):
        return max(_shared_gap(core, shared_forward, groups) for groups in _PROBE_PROMPTS)


def _shared_gap(
    core: PreTrainedModel, shared_forward: SharedForward, groups: Sequence[SharedPrompt]
) -> float:
    tokens, positions = list[Tensor](), list[Tensor]()
    expected = list[Tensor]()
    for group in groups:
        (prompt_1P,) = _random_rows(core, [group.prompt_tokens])
        tokens.append(prompt_1P)
        positions.append(torch.arange(group.prompt_tokens))
        expected.append(_alone(core, prompt_1P))
        for answer_1A in _random_rows(core, group.answer_tokens):
            tokens.append(answer_1A)
            positions.append(group.prompt_tokens + torch.arange(answer_1A.shape[1]))
            whole = _alone(core, torch.cat([prompt_1P, answer_1A], dim=1))
            expected.append(whole[:, group.prompt_tokens :])
    together_1TD = shared_forward(
        torch.cat(tokens, dim=1).to(core.device),
        torch.cat(positions).unsqueeze(0).to(core.device),
        groups,
    )
    return _gap(together_1TD, torch.cat(expected, dim=1))


def _random_rows(core: PreTrainedModel, lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = core.config.vocab_size
    return [torch.randint(vocabulary, (1, n), generator=generator) for n in lengths]


def _alone(core: PreTrainedModel, row_1T: Tensor) -> Tensor:
    return core.model(input_ids=row_1T.to(core.device), use_cache=False)[0]


@contextlib.contextmanager
def _without_dropout(core: PreTrainedModel) -> Iterator[None]:
    was_training = core.training
    core.eval()
    try:
        yield
    finally:
        core.train(was_training)


def _gap(found_1TD: Tensor, expected_1TD: Tensor) -> float:
    expected_1TD = expected_1TD.float()
    return float((found_1TD.float() - expected_1TD).abs().max() / expected_1TD.abs().max())
