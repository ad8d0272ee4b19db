"""Compares the heads of a model directory's weight files with its config. No weight is read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from qwen3_distill.errors import ModelError
from qwen3_distill.modeling.config_file import CONFIG, read_json_object
from qwen3_distill.modeling.directory import weight_files
from qwen3_distill.modeling.fp8_checkpoint import is_linear_weight, is_per_channel
from qwen3_distill.utils.shown import shortened, shown

_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = "F8_E4M3"
_BESIDE = re.compile(r".*rotary_emb\.inv_freq|.*_scale(_inv)?|.*\.[kv]_scale")
"""Tensors that readers compute themselves, and the scales of quantized weights."""
_HEAD = "lm_head.weight"
_LFS = b"version https://git-lfs.github.com/spec/"
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads"),
)


class Header(NamedTuple):
    """The type and the shape of a stored tensor."""

    dtype: str
    """safetensors' name of it, e.g. ``BF16``."""
    shape: tuple[int, ...]


def stored_headers(directory: Path) -> dict[str, Header]:
    """Read the type and the shape of every stored tensor, by name.

    Raises:
        ModelError: a file is damaged, or two files hold a tensor of one name.
    """
    headers: dict[str, Header] = {}
    file_of: dict[str, Path] = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="np") as handle:
                for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
                    if name in headers:
                        raise ModelError(
                            f"{directory}: {file_of[name].name} and {file.name} both hold "
                            f"{shown(name)}: one reader would take the one, another the other; "
                            "remove the file that is not the model's"
                        )
                    part = handle.get_slice(name)
                    headers[name] = Header(part.get_dtype(), tuple(part.get_shape()))
                    file_of[name] = file
        except (OSError, SafetensorError) as error:
            if is_git_lfs_pointer(file):
                raise ModelError(
                    f"{file} is a git-lfs pointer of {file.stat().st_size} bytes, expected the "
                    "weights; run `git lfs pull` in its repository, or download the model with "
                    "`hf download`"
                ) from error
            raise ModelError(
                f"{file} cannot be loaded: {error}; fetch it again: it may be half a download"
            ) from error
    return headers


def is_git_lfs_pointer(file: Path) -> bool:
    """Whether a file is what a clone without git-lfs has in place of a large file."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(_LFS)) == _LFS
    except OSError:
        return False


def check_weight_headers(directory: Path) -> dict[str, Header]:
    """Check that the stored tensors are those of the Qwen3 that ``config.json`` describes.

    A reader draws missing weights at random, leaves out those that it does not know, and converts
    integers.

    Raises:
        ModelError: a tensor is missing, unknown, stored twice, of another type or another shape.
    """
    config = read_json_object(directory / CONFIG)
    headers = stored_headers(directory)
    quantized = config.get("quantization_config") is not None
    allowed = (*_FLOATS, *((_FP8,) if quantized else ()))
    for name, header in headers.items():
        if header.dtype not in allowed and not _BESIDE.fullmatch(name):
            raise ModelError(
                f"{directory}: {shown(name)} is stored as {header.dtype}, expected one of "
                f"{', '.join(allowed)}; fetch the model again"
            )
    if all(type(config.get(key)) is int for key in _SIZES):
        _check_names(directory, headers, _expected(config), config)
    if is_per_channel(config.get("quantization_config")):
        _check_channel_scales(directory, headers)
    return headers


def _check_channel_scales(directory: Path, headers: Mapping[str, Header]) -> None:
    """Check that every linear layer is in FP8 with a scale per output, and nothing else is.

    SGLang casts a weight of another type to FP8 without a scale, and keeps its placeholder for a
    scale that is missing.
    """
    for name, header in headers.items():
        if _BESIDE.fullmatch(name):
            continue
        if is_linear_weight(name) != (header.dtype == _FP8):
            expected = _FP8 if is_linear_weight(name) else "not in FP8"
            raise ModelError(
                f"{directory}: {name} is stored as {header.dtype}, expected {expected}: "
                "config.json says that all linear layers but lm_head are quantized; make the "
                "checkpoint again"
            )
        if header.dtype != _FP8:
            continue
        scale, shape = headers.get(f"{name}_scale"), (header.shape[0], 1)
        if scale is None or scale.dtype not in _FLOATS or scale.shape != shape:
            found = "missing" if scale is None else f"{scale.dtype} of size {list(scale.shape)}"
            raise ModelError(
                f"{directory}: {name}_scale is {found}, expected a float of size {list(shape)}, "
                "one per output channel; make the checkpoint again"
            )


def _check_names(
    directory: Path,
    headers: Mapping[str, Header],
    expected: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
) -> None:
    optional = {_HEAD} if config.get("tie_word_embeddings") else set[str]()
    if missing := sorted(expected.keys() - headers.keys() - optional):
        names = ", ".join(missing[:5])
        raise ModelError(f"{directory}: weights are missing: {shortened(names)}; fetch it again")
    unknown = [name for name in headers if name not in expected and not _BESIDE.fullmatch(name)]
    if unknown:
        raise ModelError(
            f"{directory}: its files hold {shown(sorted(unknown))}, which the model that "
            "config.json describes does not have: they are of two models, or its sizes are wrong"
        )
    for name, shape in expected.items():
        if name in headers and headers[name].shape != shape:
            raise ModelError(
                f"{directory}: {name} is of size {list(headers[name].shape)}, but config.json says "
                f"{list(shape)}: they are of two models"
            )


def _expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a Qwen3's weights."""
    vocabulary, width, inner, num_layers, head = (config[key] for key in _SIZES[:5])
    queries, keys = (config[key] * head for key in _SIZES[5:])
    attention = {"q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width)}
    attention["o_proj"] = (width, queries)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }
    for name, shape in attention.items():
        layer[f"self_attn.{name}.weight"] = shape
        if config.get("attention_bias"):
            layer[f"self_attn.{name}.bias"] = shape[:1]
    layers = {
        f"model.layers.{index}.{name}": shape
        for index in range(num_layers)
        for name, shape in layer.items()
    }
    ends = {"model.embed_tokens.weight": (vocabulary, width), _HEAD: (vocabulary, width)}
    return {**ends, **layers, "model.norm.weight": (width,)}
