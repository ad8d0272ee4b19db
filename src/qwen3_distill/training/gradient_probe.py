"""Compares the gradients of two ways to compute a model, before it is trained.

A wrong gradient does not show: the loss falls all the same, only less. Kernels, compilers and
rounding that differ from one device to another are held against the plain way on the device itself.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ROWS, _TOKENS = 2, 24
_ADAPTER_SIZE = 0.02
"""Standard deviation of an adapter's second matrix in a probe."""


class Probe(NamedTuple):
    """Holds what one way of computing a model gives, in float32."""

    hidden: Tensor
    """Hidden states."""
    gradients: dict[str, Tensor]
    """Gradients of a random sum of them, of every trained matrix in the first and last layer."""


def probe_rows(core: PreTrainedModel) -> Probe:
    """Compute two rows of random tokens, as a micro-batch of equal lengths is computed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(core.config.vocab_size, (_ROWS, _TOKENS), generator=generator)
    return probe(core, lambda: core.model(input_ids=ids.to(core.device), use_cache=False)[0])


def probe(core: PreTrainedModel, forward: Callable[[], Tensor]) -> Probe:
    """Compute hidden states and their gradients, as they are trained, but without dropout."""
    with _without_dropout(core), _with_filled_adapters(core), torch.enable_grad():
        hidden = forward().float()
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(hidden.shape, generator=generator).to(hidden.device)
        # Not `torch.autograd.grad`: layers that are recomputed have no gradient in it.
        (hidden * weights).sum().backward()
    last = len(core.model.layers) - 1
    gradients = {
        f"{index}.{name}": torch.zeros_like(each) if each.grad is None else each.grad
        for index in dict.fromkeys((0, last))
        for name, each in core.model.layers[index].named_parameters()
        if each.requires_grad and each.dim() > 1
    }
    core.zero_grad(set_to_none=True)
    return Probe(hidden.detach(), {name: each.float() for name, each in gradients.items()})


def gradient_gap(found: Probe, expected: Probe) -> float:
    """Compute the largest gap of a matrix: the norm of the difference over the expected norm.

    Directions with a cosine of c and equal norms give sqrt(2 - 2c); a gradient of zero gives 1.
    One norm of all would hide a matrix whose gradient is small.
    """
    gaps = [
        (found.gradients[name] - gradient).norm() / gradient.norm()
        for name, gradient in expected.gradients.items()
    ]
    return float(torch.stack(gaps).max())  # NaN if one is, unlike `max`


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
def _with_filled_adapters(core: PreTrainedModel) -> Iterator[None]:
    """Fill adapters that begin with zeros: the other half of each would have no gradient."""
    generator = torch.Generator().manual_seed(0)
    before = {
        each: each.detach().clone() for name, each in core.named_parameters() if ".lora_B." in name
    }
    with torch.no_grad():
        for each in before:
            each.copy_(_ADAPTER_SIZE * torch.randn(each.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for each, values in before.items():
                each.copy_(values)
