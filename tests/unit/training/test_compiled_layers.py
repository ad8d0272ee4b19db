"""Layers that unsloth compiles are described, run uncompiled for a probe, and must not fail."""

import os
from typing import Any

import pytest
import torch

from qwen3_distill.errors import EngineStartError
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.training.unsloth.compiled_layers import (
    compiler_errors,
    describe_layers,
    uncompiled_layers,
)
from tests.tiny_models import TinyModels

CPU = torch.device("cpu")
BLOCK_COMPILE = "UNSLOTH_BLOCK_COMPILE"


def test_a_compiler_that_fails_is_an_error_with_a_way_out() -> None:
    def fails(graph: object, inputs: object) -> None:
        raise ValueError("no kernel for this")

    torch._dynamo.reset()
    broken: Any = torch.compile(lambda x: x + 1, backend=fails)
    with (
        torch._dynamo.config.patch(suppress_errors=True),  # as unsloth has it
        pytest.raises(EngineStartError, match=r"no kernel for this; .*UNSLOTH_BLOCK_COMPILE"),
        compiler_errors(),
    ):
        broken(torch.ones(2))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("modes", "said"),
    [
        ([None, None], "not compiled yet"),
        ([1, 1], "compiled"),
        ([1, 0], "as they are: unsloth could not compile them"),
    ],
)
def test_layers_are_described_by_unsloths_note(
    tiny_models: TinyModels, modes: list[int | None], said: str
) -> None:
    model = load_model(tiny_models.student, device=CPU, dtype=torch.float32)
    for layer, mode in zip(model.model.layers, modes, strict=True):
        if mode is not None:
            layer.__dict__["_unsloth_block_mode"] = mode
    assert describe_layers(model) == said


@pytest.mark.parametrize("before", [None, "1"])
def test_layers_are_compiled_again_afterwards(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    if before is None:
        monkeypatch.delenv(BLOCK_COMPILE, raising=False)
    else:
        monkeypatch.setenv(BLOCK_COMPILE, before)

    @uncompiled_layers()
    def fails() -> None:
        raise ValueError(os.environ[BLOCK_COMPILE])

    with pytest.raises(ValueError, match="0"):
        fails()
    assert os.environ.get(BLOCK_COMPILE) == before
