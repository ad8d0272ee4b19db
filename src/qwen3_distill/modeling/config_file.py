"""Reads a model's ``config.json``, and spells it for both generations of its readers.

transformers 5 moved the rotary embedding's settings: what transformers 4 reads from ``rope_theta``
and ``rope_scaling`` it keeps in ``rope_parameters``, and ``torch_dtype`` became ``dtype``. A reader
that finds only the other generation's name takes its own default, without a warning.
"""

from pathlib import Path
from typing import Any

from qwen3_distill.errors import ModelError
from qwen3_distill.utils.json_text import read_json
from qwen3_distill.utils.shown import shown

CONFIG = "config.json"
_DEFAULT_THETA = 10_000.0
"""Both generations of transformers take it for a Qwen3 without a base."""
_OUTSIDE_SCALING = ("rope_theta", "partial_rotary_factor")
"""Parts of ``rope_parameters`` that transformers 4 reads from the top level."""


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a model directory.

    Raises:
        ModelError: the file cannot be read, or holds something else.
    """
    try:
        value = read_json(file)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file} is not a JSON object: {error}; restore it from where the model came from"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{file} is not a JSON object but a {type(value).__name__}; restore it from where the "
            "model came from"
        )
    return value


def rope_parameters(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the rotary embedding's settings, under the names of transformers 5.

    Args:
        config: the content of ``file``, in either spelling or in both.

    Raises:
        ModelError: the two spellings contradict one another, or one is not a Qwen3's.
    """
    new, scaling = (_section(config, key, file) for key in ("rope_parameters", "rope_scaling"))
    stated = [(f"rope_parameters.{key}", key, value) for key, value in new.items()]
    stated += [(f"rope_scaling.{key}", key, value) for key, value in scaling.items()]
    stated += [(key, key, config[key]) for key in _OUTSIDE_SCALING if config.get(key) is not None]
    found: dict[str, Any] = {}
    places: dict[str, str] = {}
    for place, key, value in stated:
        name = "rope_type" if key == "type" else key
        if name in found and found[name] != value:
            raise ModelError(
                f"{file}: {places[name]} is {shown(found[name])} and {place} is {shown(value)}: "
                "one reader would take the one, another the other; give both the value that the "
                "model was trained with"
            )
        found.setdefault(name, value)
        places.setdefault(name, place)
    theta = found.setdefault("rope_theta", _DEFAULT_THETA)
    if type(theta) not in (int, float) or not 0 < theta <= 1e15:
        raise ModelError(f"{file}: rope_theta is {shown(theta)}, expected a positive number")
    return {"rope_type": "default", **found}


def spelled_for_both(config: dict[str, Any], file: Path, dtype: str) -> dict[str, Any]:
    """Return a copy of ``config`` that transformers 4 and 5 read as the same model.

    All other keys keep their values and their order.

    Args:
        dtype: of the weights, e.g. ``bfloat16``.
    """
    rope = rope_parameters(config, file)
    old = {key: rope[key] for key in _OUTSIDE_SCALING if key in rope}
    inside = {key: value for key, value in rope.items() if key not in _OUTSIDE_SCALING}
    scaling = config.get("rope_scaling") or {}
    if inside != {"rope_type": "default"}:
        scaling = {**scaling, **inside}
    spelled = {"rope_parameters": rope, **old, "rope_scaling": scaling or None}
    return {**config, **spelled, "dtype": dtype, "torch_dtype": dtype}


def _section(config: dict[str, Any], key: str, file: Path) -> dict[str, Any]:
    values = config.get(key)
    if values is None:
        return {}
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise ModelError(
            f"{file}: {key} is {shown(values)}, expected one object with the settings of all layers"
        )
    return values
