"""Probing packed sequences and shared prompts, and recomputing layers, in a model that any library
prepared."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
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


class Gap(NamedTuple):
    """How far rows of several sequences are from the same sequences by themselves.

    Rounding gives 1e-6 in float32. Sequences that see one another give about 1.
    """

    hidden: float
    """Largest difference of hidden states, over the largest hidden state."""
    gradient: float
    """Norm of the difference of gradients, over their norm: of the first and the last layer."""

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
    """Compare what two ways of computing [1, T, D] give, as they are trained, without dropout."""
    with _without_dropout(core):
        found_1TD, found = _with_gradient(core, together)
        with _uncompiled():
            expected_1TD, expected = _with_gradient(core, alone)
    hidden = (found_1TD - expected_1TD).abs().max() / expected_1TD.abs().max()
    return Gap(float(hidden), float((found - expected).norm() / expected.norm()))


def _largest(gaps: Sequence[Gap]) -> Gap:
    largest = torch.tensor(gaps, dtype=torch.float64).amax(dim=0)  # NaN if one is, unlike `max`
    return Gap(*largest.tolist())


def _with_gradient(core: PreTrainedModel, forward: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return hidden states and, of their random sum, the gradient of two layers; in float32."""
    with torch.enable_grad():
        hidden_1TD = forward().float()
        generator = torch.Generator().manual_seed(0)
        weights_1TD = torch.randn(hidden_1TD.shape, generator=generator)
        # Recomputed layers take a backward pass to all parameters only.
        (hidden_1TD * weights_1TD.to(hidden_1TD.device)).sum().backward()
    layers = core.model.layers
    trained = [
        each
        for layer in (layers[0], layers[-1])
        for each in layer.parameters()
        if each.requires_grad
    ]
    parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
    core.zero_grad(set_to_none=True)
    return hidden_1TD.detach(), torch.cat([part.float().flatten() for part in parts])


@contextlib.contextmanager
def _without_dropout(core: PreTrainedModel) -> Iterator[None]:
    """Switch dropout alone off: as a whole, a model that does not train runs in another way."""
    active = [each for each in core.modules() if isinstance(each, nn.Dropout) and each.training]
    for each in active:
        each.eval()
    try:
        yield
    finally:
        for each in active:
            each.train()


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Have unsloth run its layers as they are: for some rows a compilation takes too long."""
    name = "UNSLOTH_BLOCK_COMPILE"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
