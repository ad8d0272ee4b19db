"""Compares the gradients of two ways to compute a model, before it is trained.

A wrong gradient does not show: the loss falls all the same, only less. Kernels, compilers and
rounding that differ from one device to another are held against the plain way on the device itself.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ROWS, _TOKENS = 2, 24


class Probe(NamedTuple):
    """Holds what one way of computing a model gives, in float32."""

    hidden: Tensor
    """Hidden states."""
    gradient: Tensor
    """[parameters]: of a random sum of the hidden states, for the first and the last layer."""


def probe_rows(core: PreTrainedModel) -> Probe:
    """Compute two rows of random tokens, as a micro-batch of equal lengths is computed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(core.config.vocab_size, (_ROWS, _TOKENS), generator=generator)
    return probe(core, lambda: core.model(input_ids=ids.to(core.device), use_cache=False)[0])


def probe(core: PreTrainedModel, forward: Callable[[], Tensor]) -> Probe:
    """Compute hidden states and their gradient, as they are trained, but without dropout."""
    with _without_dropout(core), torch.enable_grad():
        hidden = forward().float()
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(hidden.shape, generator=generator).to(hidden.device)
        # Not `torch.autograd.grad`: layers that are recomputed have no gradient in it.
        (hidden * weights).sum().backward()
    layers = core.model.layers
    trained = [
        each
        for layer in (layers[0], layers[-1])
        for each in layer.parameters()
        if each.requires_grad
    ]
    parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
    core.zero_grad(set_to_none=True)
    return Probe(hidden.detach(), torch.cat([part.float().flatten() for part in parts]))


def gradient_gap(found: Probe, expected: Probe) -> float:
    """Compute the norm of the gradients' difference over the expected one's norm.

    Directions with a cosine of c and equal norms give sqrt(2 - 2c); a gradient of zero gives 1.
    """
    return float((found.gradient - expected.gradient).norm() / expected.gradient.norm())


@contextlib.contextmanager
def layers_as_they_are() -> Iterator[None]:
    """Have unsloth run layers uncompiled."""
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
