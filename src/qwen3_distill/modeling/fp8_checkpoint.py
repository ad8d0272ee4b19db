"""Tells how a checkpoint's FP8 weights are scaled. No torch.

Two forms are read: Qwen's own, with a scale per block of 128 x 128 weights (``weight_scale_inv``),
and that of compressed-tensors with a scale per output channel (``weight_scale`` of shape
``[outputs, 1]``), in which SGLang and vLLM scale activations per token while they compute. The
latter is what llm-compressor's scheme FP8_DYNAMIC writes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from qwen3_distill.utils.shown import shortened, shown

COMPRESSED_TENSORS = "compressed-tensors"
_FORMAT = "float-quantized"
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_WEIGHTS = {**_FP8, "strategy": "channel", "dynamic": False}
_ACTIVATIONS = {**_FP8, "strategy": "token", "dynamic": True}
_ABSENT = ("group_size", "actorder", "block_structure")
_DEFAULTS = {"num_bits": 8, "symmetric": True, "dynamic": False}
"""Values that compressed-tensors takes for settings that are not there."""
_OTHER_FORMS = ("kv_cache_scheme", "sparsity_config", "transform_config", "linear_fp8_config")
"""Settings of a quantization besides that of the linear layers."""
CHANNEL_SETTINGS: Mapping[str, Any] = {
    "quant_method": COMPRESSED_TENSORS,
    "format": _FORMAT,
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _WEIGHTS,
            "input_activations": _ACTIVATIONS,
            "output_activations": None,
        }
    },
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
}
"""The ``quantization_config`` of a checkpoint with a scale per channel."""


def is_per_channel(settings: Any) -> bool:
    """Whether a ``quantization_config`` is that of FP8 weights with a scale per output channel."""
    return _method(settings) == COMPRESSED_TENSORS and not channel_faults(settings)


def is_compressed_tensors(settings: Any) -> bool:
    """Whether a ``quantization_config`` is one of compressed-tensors, in whatever form."""
    return _method(settings) == COMPRESSED_TENSORS


def channel_faults(settings: Mapping[str, Any]) -> list[str]:
    """Return where settings of compressed-tensors differ from those that are read."""
    return [shortened(fault) for fault in _faults(settings)]


def is_linear_weight(name: str) -> bool:
    """Whether a weight of a Qwen3 is one that an FP8 checkpoint holds in FP8."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def _method(settings: Any) -> Any:
    return settings.get("quant_method") if isinstance(settings, Mapping) else None


def _faults(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from _unequal("format", settings.get("format"), _FORMAT)
    yield from _unequal("ignore", settings.get("ignore"), ["lm_head"])
    for key in _OTHER_FORMS:
        if settings.get(key):
            yield f"{key} is {shown(settings[key])}, expected none"
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        yield f"config_groups is {shown(groups)}, expected one group"
        return
    ((name, group),) = groups.items()
    if not isinstance(group, Mapping):
        yield f"config_groups.{name} is {shown(group)}, expected an object"
        return
    yield from _unequal(f"{name}.targets", group.get("targets"), ["Linear"])
    yield from _unequal(f"{name}.format", group.get("format") or _FORMAT, _FORMAT)
    if group.get("output_activations"):
        yield f"{name}.output_activations is {shown(group['output_activations'])}, expected none"
    for part, expected in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
        yield from _part_faults(f"{name}.{part}", group.get(part), expected)


def _part_faults(name: str, found: Any, expected: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(found, Mapping):
        yield f"{name} is {shown(found)}, expected an object"
        return
    for key, value in expected.items():
        yield from _unequal(f"{name}.{key}", found.get(key, _DEFAULTS.get(key)), value)
    for key in _ABSENT:
        yield from _unequal(f"{name}.{key}", found.get(key), None)


def _unequal(name: str, found: Any, expected: Any) -> Iterator[str]:
    if found != expected or type(found) is not type(expected):
        yield f"{name} is {shown(found)}, expected {shown(expected)}"
