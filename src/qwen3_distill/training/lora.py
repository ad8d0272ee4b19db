"""Low-rank adapters in a plain model: add, initialise, export and merge them.

Names are those of the plain Qwen3 model (``model.layers.0...``) with peft's ``base_layer`` and
``lora_A.default`` in them, whichever library put the adapters there.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from qwen3_distill.config import LoraTuning
from qwen3_distill.errors import ConfigError
from qwen3_distill.ports import LoraWeights
from qwen3_distill.training.fp8_base import Fp8Linear
from qwen3_distill.training.shelf import Shelf, lends, shelf_bytes
from qwen3_distill.utils.seeds import derive_seed

_INIT_SEED = "lora_init"
ADAPTER = "default"
"""Name of the one adapter that a model has here."""
_PEFT_PREFIX = "base_model.model."


def add_adapters(base: PreTrainedModel, tuning: LoraTuning, seed: int) -> PreTrainedModel:
    """Add adapters to the model in place and freeze the base.

    Raises:
        ConfigError: a target is not a linear layer of the model's blocks.
    """
    check_targets(base, tuning)
    with torch.random.fork_rng(devices=[]):  # peft draws weights that are replaced below
        get_peft_model(  # changes `base` in place
            base,
            LoraConfig(
                r=tuning.rank,
                lora_alpha=tuning.alpha,  # pyright: ignore[reportArgumentType] - annotated int
                lora_dropout=tuning.dropout,
                target_modules=list(tuning.target_modules),
                task_type="CAUSAL_LM",
            ),
        )
    initialise_adapters(base, seed)
    return base


def check_targets(base: PreTrainedModel, tuning: LoraTuning) -> None:
    """Refuse targets outside the blocks.

    The output head is applied as a bare weight, so an adapter on it or on a tied embedding would
    have no effect there.
    """
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in base.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    unknown = sorted(set(tuning.target_modules) - linear)
    if unknown:
        raise ConfigError(
            f"training.tuning.target_modules: {', '.join(unknown)} is no linear layer of the "
            f"student's blocks; they are {', '.join(sorted(linear))}"
        )


@torch.no_grad()
def initialise_adapters(core: PreTrainedModel, seed: int) -> None:
    """Set B = 0 and draw A uniformly from +-1/sqrt(inputs), as peft does.

    The draw depends on (seed, layer name) only, so that a run starts from the same adapters on
    every device, with every library and in every order.
    """
    for name, layer in _adapted(core).items():
        generator = torch.Generator().manual_seed(derive_seed(seed, _INIT_SEED, name))
        down = layer.lora_A[ADAPTER].weight
        bound = 1 / math.sqrt(down.shape[1])
        drawn = torch.empty(down.shape, dtype=torch.float32)
        down.copy_(drawn.uniform_(-bound, bound, generator=generator))
        layer.lora_B[ADAPTER].weight.zero_()


def adapter_weights(core: PreTrainedModel, tuning: LoraTuning) -> LoraWeights:
    """Return the trained adapters under peft's names."""
    return LoraWeights(
        tensors={
            _PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): parameter.detach()
            for name, parameter in core.named_parameters()
            if ".lora_" in name
        },
        rank=tuning.rank,
        alpha=tuning.alpha,
        target_modules=tuning.target_modules,
    )


@torch.no_grad()
def merged_parameters(core: PreTrainedModel, *, lent: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values of a model without adapters, the adapters merged in.

    The merge is done on a copy: merging in place and undoing it would round the base weights at
    every step.

    Args:
        lent: all values are kept, for another process to read them where they are.
    """
    adapted = _adapted(core)
    shelf = Shelf(_merged_bytes(adapted)) if lent and lends(core.device) else None
    for name, parameter in core.named_parameters():
        if ".lora_" in name:
            continue
        owner, _, leaf = name.partition(".base_layer.")
        if leaf != "weight" or owner not in adapted:
            yield name.replace(".base_layer.", "."), parameter.detach()
            continue
        yield f"{owner}.weight", _merged(adapted[owner], parameter.detach(), shelf)
    for owner, layer in adapted.items():
        if isinstance(layer.base_layer, Fp8Linear):  # its weight is no parameter
            yield f"{owner}.weight", _merged(layer, layer.base_layer.original(), shelf)


def _merged(layer: Any, weight_NK: Tensor, shelf: Shelf | None) -> Tensor:
    delta_NK = layer.get_delta_weight(ADAPTER).to(weight_NK.dtype)
    if shelf is None:
        return weight_NK + delta_NK
    return torch.add(weight_NK, delta_NK, out=shelf.like(weight_NK))


def _merged_bytes(adapted: Mapping[str, Any]) -> int:
    """Add up the bytes of all weights that adapters are merged into."""
    layers = [layer.base_layer for layer in adapted.values()]
    return sum(
        shelf_bytes(x.original_bytes if isinstance(x, Fp8Linear) else x.weight.nbytes)
        for x in layers
    )


def _adapted(core: PreTrainedModel) -> dict[str, Any]:
    return {name: module for name, module in core.named_modules() if isinstance(module, LoraLayer)}
