"""Our attention in layers that are compiled as unsloth compiles its own."""

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from qwen3_distill.training import flash_rows, prompt_attention
from qwen3_distill.training.batching import SharedPrompt
from qwen3_distill.training.prompt_attention import PromptAttention
from qwen3_distill.training.unsloth import attention as patches
from qwen3_distill.training.unsloth.attention import (
    arguments_with,
    attention_of_running,
    hand_over,
)
from tests.flash_stand_in import FlashStandIn

pytestmark = [
    # Of a region that begins behind our attention, which dynamo asks for a gradient.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # PyTorch's own, where it traces an autograd function.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

HEADS, SIZE = 2, 8
LIBRARY = SimpleNamespace()
"""Stands for the module of unsloth whose `run_attention` its layers call by name."""


def causal(*, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(Q, K, V, is_causal=True)
    return out.transpose(1, 2)


class Attention(nn.Module):
    head_dim = SIZE

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * SIZE, 3 * HEADS * SIZE)

    def forward(self, hidden: Tensor, **options: Any) -> Tensor:
        batch, size, width = hidden.shape
        Q, K, V = (
            part.view(batch, size, HEADS, SIZE).transpose(1, 2)
            for part in self.qkv(hidden).chunk(3, dim=-1)
        )
        out = LIBRARY.run_attention(config=None, context=options, Q=Q, K=K, V=V)
        return out.reshape(batch, size, width)


def layer_class(backend: Any) -> Any:
    """Return a class of layers, compiled but for calls with such arguments, as unsloth does."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention()
            self.mlp = nn.Linear(HEADS * SIZE, HEADS * SIZE)

        def forward(self, hidden: Tensor, **options: Any) -> Tensor:
            hidden = hidden + self.self_attn(hidden, **options)
            return hidden + self.mlp(hidden).relu()

    original = Layer.forward
    compiled = torch.compile(original, backend=backend)

    @functools.wraps(original)
    def forward(self: Any, hidden: Tensor, **options: Any) -> Tensor:
        if any(options.get(name) is not None for name in ("prefix_seg_info", "packed_seq_lengths")):
            return original(self, hidden, **options)
        torch._dynamo.maybe_mark_dynamic(hidden, 1)
        return compiled(self, hidden, **options)

    Layer.forward = forward
    return Layer


@pytest.fixture(autouse=True)
def own_library() -> Iterator[None]:
    LIBRARY.run_attention = causal
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    patches._RUNNING.attention = patches._RUNNING.row = None


def rows(answers: int, size: int) -> tuple[Tensor, PromptAttention]:
    shared = [SharedPrompt(start=0, prompt_tokens=5, answer_tokens=(size,) * answers)]
    generator = torch.Generator().manual_seed(size)
    hidden = torch.randn(1, 5 + answers * size, HEADS * SIZE, generator=generator)
    return hidden, PromptAttention(shared, torch.device("cpu"))


@pytest.fixture(params=["beside the region", "inside, in one launch"])
def inside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both places of our attention; whether it is inside."""
    if request.param == "beside the region":
        return False
    monkeypatch.setattr(prompt_attention, "flash_runs", lambda *given: True)
    monkeypatch.setattr(flash_rows, "_Flash", FlashStandIn)
    return True


def test_layers_stay_compiled_and_give_the_same(inside: bool) -> None:
    counter = CompileCounter()
    kind = layer_class(counter)
    layer = kind()
    LIBRARY.run_attention = attention_of_running(causal)
    uncompiled = kind.forward.__wrapped__
    hand_over([layer])
    compiled_so_far = list[int]()
    for size in (3, 4, 6, 7, 9):
        hidden, attention = rows(2, size)
        found, expected = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        out = layer(found, **arguments_with(attention, hidden.shape[1]))
        patches._RUNNING.attention = attention
        wanted = uncompiled(layer, expected)
        patches._RUNNING.attention = None
        torch.testing.assert_close(out, wanted)
        out.square().sum().backward()
        wanted.square().sum().backward()
        torch.testing.assert_close(found.grad, expected.grad)
        compiled_so_far.append(counter.frame_count)
    assert compiled_so_far[0] > 0  # the layer is compiled ...
    assert len(set(compiled_so_far[2:])) == 1  # ... and not again for every length
    if inside:
        assert compiled_so_far == [1] * 5  # ... as one region


def test_a_compiler_follows_the_kernel_itself_for_rows_of_any_lengths() -> None:
    """No device is needed for shapes, so the kernel's own operators are traced."""
    counter = CompileCounterWithBackend("aot_eager")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert patches._RUNNING.row is not None
        return patches._RUNNING.row.attend(query * 2, key, value, scale=0.5) + 1

    compiled: Any = torch.compile(attend, backend=counter, fullgraph=True)
    for answers in ((3, 4), (8, 8), (1,), (20, 5, 9, 30)):
        shared = [SharedPrompt(start=0, prompt_tokens=7, answer_tokens=answers)]
        given = [
            torch.randn(heads, 7 + sum(answers), 64, dtype=torch.bfloat16, device="meta")
            for heads in (8, 2, 2)
        ]
        for values in given:
            torch._dynamo.maybe_mark_dynamic(values, 1)
            values.requires_grad_()
        patches._RUNNING.row = flash_rows.flash_row(shared, torch.device("meta"))
        out = compiled(*given)
        out.float().sum().backward()
        assert out.shape == given[0].shape
        assert [each.grad.shape for each in given if each.grad is not None] == [
            each.shape for each in given
        ]
        assert counter.frame_count == 1


@pytest.mark.usefixtures("inside")
def test_a_layer_without_an_attention_runs_the_librarys_own() -> None:
    kind = layer_class("eager")
    LIBRARY.run_attention = attention_of_running(causal)
    layer, (hidden, attention) = kind(), rows(2, 4)
    expected = layer(hidden)
    hand_over([layer])
    torch.testing.assert_close(layer(hidden), expected)
    assert not torch.allclose(layer(hidden, **arguments_with(attention, hidden.shape[1])), expected)
    torch.testing.assert_close(layer(hidden), expected)


@pytest.mark.usefixtures("inside")
def test_a_layer_attends_so_after_another_model_was_loaded() -> None:
    """Unsloth gives the class of all layers another forward pass for every model."""
    kind, other = layer_class("eager"), layer_class("eager")
    LIBRARY.run_attention = attention_of_running(causal)
    layer, (hidden, attention) = kind(), rows(2, 4)
    hand_over([layer])
    given = arguments_with(attention, hidden.shape[1])
    expected = layer(hidden, **given)
    kind.forward = other.forward
    torch.testing.assert_close(layer(hidden, **given), expected)


def test_a_layer_that_fails_leaves_no_attention_behind(inside: bool) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention()

        def forward(self, hidden: Tensor) -> Tensor:
            assert patches._RUNNING.attention is not None
            assert (patches._RUNNING.row is not None) == inside
            raise ValueError("no memory")

    _, attention = rows(2, 4)
    layer = Layer()
    hand_over([layer])
    with pytest.raises(ValueError, match="no memory"):
        layer(torch.zeros(1), **arguments_with(attention, 1))
    assert patches._RUNNING.attention is None
    assert patches._RUNNING.row is None
