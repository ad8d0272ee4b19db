"""Describes the layers that unsloth compiles, and says how they run while a learner is probed."""

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from qwen3_distill.errors import EngineStartError


def describe_layers(core: PreTrainedModel) -> str:
    """Say whether unsloth compiled the layers, as far as they have run as they are trained."""
    # Its own note: None before the first such run and on a CPU, 0 where the compiler failed.
    modes = {layer.__dict__.get("_unsloth_block_mode") for layer in core.model.layers}
    if modes == {None}:
        return "not compiled yet"
    return "as they are: unsloth could not compile them" if 0 in modes else "compiled"


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """Have a compiler that fails say so: unsloth lets it run a layer in pieces, slowly.

    Raises:
        EngineStartError: it failed.
    """
    dynamo: Any = importlib.import_module("torch._dynamo")
    with dynamo.config.patch(suppress_errors=False):
        try:
            yield
        except dynamo.exc.TorchDynamoException as error:
            why = " ".join(str(error).split("\n")[:2])  # which part of it failed, and of what
            raise EngineStartError(
                f"unsloth learner: PyTorch's compiler failed on the student's layers: {why}; to "
                'run them as they are, set training.environment={UNSLOTH_BLOCK_COMPILE: "0"}'
            ) from error


@contextlib.contextmanager
def uncompiled_layers() -> Iterator[None]:
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
