"""The formulas count what PyTorch's counter counts, on a tiny model.

The counter counts all pairs of an attention without a fused kernel (``eager``), masked ones too, so
the formulas are told the square.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from qwen3_distill.config import FullDivergence, FullTuning, LoraTuning, TuningConfig
from qwen3_distill.modeling.flops import (
    TrainedTokens,
    causal_pairs,
    forward_flops,
    head_flops,
    objective_flops,
    sampling_flops,
    training_flops,
)
from qwen3_distill.modeling.head import token_stats
from qwen3_distill.modeling.loading import output_head
from qwen3_distill.modeling.shapes import named_shape, read_shape
from qwen3_distill.training.batching import HiddenMicroBatch
from qwen3_distill.training.lora import add_adapters
from qwen3_distill.training.objectives.divergences import full_divergence
from tests.tiny_models import TinyModels

ROWS, LENGTH = 3, 12
LORA = LoraTuning(kind="lora", rank=4, alpha=4.0)
ATTENTION_LORA = LoraTuning(kind="lora", rank=2, alpha=4.0, target_modules=("q_proj", "v_proj"))
FULL = FullTuning(kind="full")


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0))


def work(**changes: int) -> TrainedTokens:
    values = {
        "tokens": ROWS * LENGTH,
        "pairs": ROWS * LENGTH * LENGTH,
        "loss_tokens": ROWS * LENGTH,
        "recomputed_loss_tokens": 0,
        "recomputed_layers": 0,
    }
    return TrainedTokens(**(values | changes))


def counted_step(
    directory: Path, tuning: TuningConfig, *, checkpoints: bool, chunk_tokens: int
) -> int:
    """Count a training step as the embedded learner computes it."""
    model = load(directory)
    if isinstance(tuning, LoraTuning):
        model = add_adapters(model, tuning, seed=0)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    ids_BT = tokens(ROWS, LENGTH)
    with FlopCounterMode(display=False) as counter:
        hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        stats = token_stats(
            hidden_BTD.flatten(0, 1),
            output_head(model),
            ids_BT.flatten(),
            chunk_tokens=chunk_tokens,
        )
        stats.logprob_N.sum().backward()
    return counter.get_total_flops()


def test_a_forward_pass_costs_what_the_counter_counts(tiny_models: TinyModels) -> None:
    for directory in (tiny_models.student, tiny_models.teacher):
        model = load(directory)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=tokens(ROWS, LENGTH), use_cache=False)
        assert counter.get_total_flops() == forward_flops(
            read_shape(directory),
            tokens=ROWS * LENGTH,
            pairs=ROWS * LENGTH * LENGTH,
            head_tokens=ROWS * LENGTH,
        )


@pytest.mark.parametrize("tuning", [FULL, LORA, ATTENTION_LORA], ids=["full", "lora", "q, v"])
@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("chunk_tokens", [1000, 8], ids=["one chunk", "chunks"])
def test_a_training_step_costs_what_the_counter_counts(
    tiny_models: TinyModels, tuning: TuningConfig, checkpoints: bool, chunk_tokens: int
) -> None:
    shape = read_shape(tiny_models.student)
    counted = counted_step(
        tiny_models.student, tuning, checkpoints=checkpoints, chunk_tokens=chunk_tokens
    )
    recomputed = ROWS * LENGTH if chunk_tokens < ROWS * LENGTH else 0
    layers = shape.num_layers if checkpoints else 0
    formula = training_flops(
        shape, tuning, work(recomputed_layers=layers, recomputed_loss_tokens=recomputed)
    )
    skipped = 0
    if tuning is ATTENTION_LORA and not checkpoints:
        # The first block's keys need no gradient; fused attention kernels compute it all the same.
        skipped = 2 * shape.query_size * ROWS * LENGTH * LENGTH
    assert formula == counted + skipped


def test_decoding_with_a_cache_costs_what_the_counter_counts(tiny_models: TinyModels) -> None:
    model, shape = load(tiny_models.student), read_shape(tiny_models.student)
    prompt, response = 7, 5
    ids_BT = tokens(1, prompt)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids_BT, use_cache=True, logits_to_keep=1)
        for _ in range(response - 1):
            last_BT = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(
                input_ids=last_BT,
                past_key_values=output.past_key_values,
                use_cache=True,
                logits_to_keep=1,
            )
    whole = sampling_flops(shape, prompt=prompt, response=response, prefills=True)
    # The counter counts the prompt's masked pairs as well; a decode step has none.
    masked = forward_flops(
        shape, tokens=0, pairs=prompt * prompt - causal_pairs(prompt), head_tokens=0
    )
    assert counter.get_total_flops() == whole + masked
    shared = sampling_flops(shape, prompt=prompt, response=response, prefills=False)
    alone = forward_flops(shape, tokens=prompt, pairs=causal_pairs(prompt), head_tokens=0)
    assert whole == shared + alone


def test_the_full_divergence_adds_the_teachers_head(tiny_models: TinyModels) -> None:
    student, teacher = read_shape(tiny_models.student), read_shape(tiny_models.teacher)
    objective = FullDivergence(kind="full")
    num, generator = 24, torch.Generator().manual_seed(0)
    head_VD = torch.randn(student.vocab_size, student.hidden_size, generator=generator)
    hidden_ND = torch.randn(num, student.hidden_size, generator=generator, requires_grad=True)
    teacher_head_VD = torch.randn(teacher.vocab_size, teacher.hidden_size, generator=generator)
    micro: Any = HiddenMicroBatch.__new__(HiddenMicroBatch)
    for name, value in {
        "teacher_hidden_ND": torch.randn(num, teacher.hidden_size, generator=generator),
        "target_N": torch.zeros(num, dtype=torch.int64),
    }.items():
        object.__setattr__(micro, name, value)
    for chunk_tokens, recomputed in ((1000, 0), (8, num)):
        with FlopCounterMode(display=False) as counter:
            columns = full_divergence(
                micro, hidden_ND, head_VD, teacher_head_VD, objective, chunk_tokens
            )
            columns[0].sum().backward()
        counts = work(loss_tokens=num, recomputed_loss_tokens=recomputed)
        own = head_flops(student, 2 * num + recomputed)
        extra = objective_flops(student, teacher, objective, counts)
        assert counter.get_total_flops() == own + extra


def test_a_forward_pass_of_qwen3_4b_costs_twice_its_parameters_per_token() -> None:
    shape = named_shape("4B")
    count = forward_flops(shape, tokens=1, pairs=1, head_tokens=1)
    assert count == pytest.approx(2 * shape.num_parameters, rel=1e-3)


def test_causal_pairs_of_parts_add_up_to_those_of_the_whole() -> None:
    assert causal_pairs(5) == 15
    assert causal_pairs(5) + causal_pairs(3, cached=5) == causal_pairs(8)
