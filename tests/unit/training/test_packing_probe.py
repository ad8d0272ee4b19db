"""The probes compare packed rows and shared prompts with the same sequences by themselves."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qwen3_distill.errors import EngineStartError
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.training.batching import SharedPrompt
from qwen3_distill.training.unsloth.packing_probe import (
    Gap,
    packing_gap,
    shared_prompts_gap,
)
from tests.tiny_models import TinyModels

CPU = torch.device("cpu")


def test_the_probe_tells_packing_from_attention_across_sequences(tiny_models: TinyModels) -> None:
    model = load_model(tiny_models.student, device=CPU, dtype=torch.float32).train()

    def right(input_1T: Tensor, position_1T: Tensor, lengths: Sequence[int]) -> Tensor:
        return model.model(input_ids=input_1T, position_ids=position_1T, use_cache=False)[0]

    def blind(input_1T: Tensor, position_1T: Tensor, lengths: Sequence[int]) -> Tensor:
        """Causal over the whole row, as attention without the boundaries is."""
        mask = torch.ones_like(input_1T)
        return model.model(
            input_ids=input_1T, position_ids=position_1T, attention_mask=mask, use_cache=False
        )[0]

    def nothing_once(input_1T: Tensor, position_1T: Tensor, lengths: Sequence[int]) -> Tensor:
        return right(input_1T, position_1T, lengths) * (math.nan if len(lengths) == 2 else 1)

    def untaught(input_1T: Tensor, position_1T: Tensor, lengths: Sequence[int]) -> Tensor:
        """Hidden states that are right, with a gradient of the last layer's MLP alone."""
        mlp = model.model.layers[-1].mlp
        hook = mlp.register_forward_pre_hook(lambda _, given: (given[0].detach(),))
        try:
            return right(input_1T, position_1T, lengths)
        finally:
            hook.remove()

    assert max(packing_gap(model, right)) < 1e-5  # of any matrix
    assert min(packing_gap(model, blind)) > 0.1
    assert math.isnan(packing_gap(model, nothing_once).hidden)
    gap = packing_gap(model, untaught)
    assert gap.hidden < 1e-5
    assert gap.gradient > 0.1
    assert gap.exceeds(Gap(hidden=1e-3, gradient=1e-3))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_probe_tells_answers_that_read_another_prompt(tiny_models: TinyModels) -> None:
    model = load_model(tiny_models.student, device=CPU, dtype=torch.float32).train()

    def behind(ids_1T: Tensor, groups: Sequence[SharedPrompt], prompt_of: list[int]) -> Tensor:
        """Compute answers by themselves, each behind the prompt of another group."""
        parts = list[Tensor]()
        for group, other in zip(groups, prompt_of, strict=True):
            start, length = group.start, group.prompt_tokens
            prompt_1P = ids_1T[:, groups[other].start :][:, :length]
            at = start + length
            parts.append(model.model(input_ids=ids_1T[:, start:at], use_cache=False)[0])
            for tokens in group.answer_tokens:
                whole_1T = torch.cat([prompt_1P, ids_1T[:, at : at + tokens]], dim=1)
                hidden = model.model(input_ids=whole_1T, use_cache=False)[0]
                parts.append(hidden[:, length:])
                at += tokens
        return torch.cat(parts, dim=1)

    assert max(shared_prompts_gap(model, lambda ids, _, at: behind(ids, at, [0, 1]))) < 1e-5
    assert min(shared_prompts_gap(model, lambda ids, _, at: behind(ids, at, [0, 0]))) > 0.1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.parametrize("compiles", [True, False])
def test_a_compiler_must_not_fail_where_our_attention_is_inside(
    tiny_models: TinyModels, compiles: bool
) -> None:
    model = load_model(tiny_models.student, device=CPU, dtype=torch.float32).train()

    def fails(graph: object, inputs: object) -> None:
        raise ValueError("no kernel for this")

    @torch.compile(backend=fails)
    def broken(hidden: Tensor) -> Tensor:
        return hidden + 0

    def together(input_1T: Tensor, position_1T: Tensor, lengths: Sequence[int]) -> Tensor:
        hidden = model.model(input_ids=input_1T, position_ids=position_1T, use_cache=False)[0]
        return broken(hidden)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(suppress_errors=True):  # as unsloth has it
        if compiles:
            with pytest.raises(EngineStartError, match="no kernel for this"):
                packing_gap(model, together, compiles=True)
        else:
            assert max(packing_gap(model, together)) < 1e-5
    torch._dynamo.reset()


def test_a_gap_that_is_not_finite_exceeds_any_limit() -> None:
    limit = Gap(hidden=1.0, gradient=1.0)
    assert not Gap(hidden=1.0, gradient=1.0).exceeds(limit)
    assert Gap(hidden=float("nan"), gradient=0.0).exceeds(limit)
    assert Gap(hidden=0.0, gradient=float("nan")).exceeds(limit)
