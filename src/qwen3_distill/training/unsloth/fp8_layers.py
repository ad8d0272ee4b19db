"""Input gradients in FP8 in the layers that unsloth fuses with their adapters."""

import importlib
import types
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from qwen3_distill.errors import EngineStartError
from qwen3_distill.training.fp8_adapters import (
    Adapted,
    Kernels,
    Turned,
    adapted_mlp,
    adapted_outputs,
)
from qwen3_distill.training.lora import ADAPTER

_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def round_fused_gradients(core: PreTrainedModel) -> set[str]:
    """Replace the functions that unsloth gave the model's layers.

    It fuses queries, keys and values, attention's output and the MLP, each where all of its layers
    have adapters.

    Returns:
        names of the linear layers whose input gradients are in float8 now.

    Raises:
        EngineStartError: unsloth fused layers in a way that is not known here.
    """
    fused: Any = importlib.import_module("unsloth.kernels.fast_lora")  # needs triton, not on a CPU
    llama: Any = importlib.import_module("unsloth.models.llama")
    kernels = Kernels(
        importlib.import_module("unsloth.kernels.utils").addmm_,
        fused.swiglu_fg_kernel,
        fused.swiglu_DWf_DW_dfg_kernel,
    )
    names = replace_fused(core, fused, kernels)
    # A fused function reads the weights themselves: what is put in a layer's place has no effect.
    if left := llama._fused_lora_modules(core):
        raise EngineStartError(
            f"unsloth learner: training.base_precision=fp8_backward, but unsloth fused {len(left)} "
            f"modules in another way ({type(left[0]).__name__}); use base_precision=as_loaded"
        )
    return names


def replace_fused(core: PreTrainedModel, fused: Any, kernels: Kernels) -> set[str]:
    """Replace the functions that are those of unsloth's module; return the layers' names."""

    def apply_qkv(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
        return adapted_outputs(x, _adapted(attention, *_QKV), attention.turned_qkv, kernels)

    def apply_o(attention: Any, x: Tensor) -> Tensor:
        return adapted_outputs(x, _adapted(attention, "o_proj"), attention.turned_o, kernels)[0]

    def forward(mlp: Any, x: Tensor) -> Tensor:
        return adapted_mlp(x, _adapted(mlp, *_MLP), mlp.turned_gate_up, mlp.turned_down, kernels)

    names = set[str]()
    for index, layer in enumerate(core.model.layers):
        attention, mlp, prefix = layer.self_attn, layer.mlp, f"model.layers.{index}"
        if getattr(attention, "apply_qkv", None) is fused.apply_lora_qkv:
            attention.turned_qkv = _turned(attention, *_QKV)
            attention.apply_qkv = apply_qkv
            names.update(f"{prefix}.self_attn.{name}" for name in _QKV)
        if getattr(attention, "apply_o", None) is fused.apply_lora_o:
            attention.turned_o = _turned(attention, "o_proj")
            attention.apply_o = apply_o
            names.add(f"{prefix}.self_attn.o_proj")
        if getattr(mlp.forward, "__func__", None) is fused.apply_lora_mlp_swiglu:
            mlp.turned_gate_up = _turned(mlp, "gate_proj", "up_proj")
            mlp.turned_down = _turned(mlp, "down_proj")
            mlp.forward = types.MethodType(forward, mlp)
            names.update(f"{prefix}.mlp.{name}" for name in _MLP)
    return names


def _turned(module: Any, *names: str) -> Turned:
    return Turned([getattr(module, name).base_layer.weight for name in names])


def _adapted(module: Any, *names: str) -> list[Adapted]:
    layers = []
    for name in names:
        layer = getattr(module, name)
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        layers.append(
            Adapted(layer.base_layer.weight, down.weight, up.weight, layer.scaling[ADAPTER])
        )
    return layers
