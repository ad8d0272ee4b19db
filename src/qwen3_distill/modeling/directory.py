"""Checks model directories. No torch."""

import stat
from pathlib import Path
from typing import Any

from qwen3_distill.errors import ModelError
from qwen3_distill.modeling.config_file import CONFIG, read_json_object, rope_parameters
from qwen3_distill.modeling.fp8_checkpoint import channel_faults, is_compressed_tensors
from qwen3_distill.utils.shown import shown

SUPPORTED_MODEL_TYPES = ("qwen3",)
INDEX = "model.safetensors.index.json"
_QUANTIZED_BY_FILE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files beside ``config.json`` in which GPTQ, AWQ and ModelOpt describe quantized weights."""
_READ = (".json", ".jinja", ".safetensors", ".txt", ".model")
"""Endings of the files that readers of a model open."""
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Values of a config's attention that are no code from elsewhere. None of them is used: each engine
chooses its own."""
_SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 4096,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "max_position_embeddings": 1 << 30,
}
"""Largest sizes that are read as those of a model."""


def check_model_dir(path: str | Path, *, weights: bool = True) -> Path:
    """Return the directory if it holds a dense Qwen3 model.

    Args:
        weights: False: its weights may be missing.

    Raises:
        ModelError: it is missing, has no config or weights, or has another architecture; or its
            config can be read in two ways.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(
            f"model directory {directory} does not exist (working directory {Path.cwd()}); give "
            "the path of a Hugging Face model directory, or a hub id such as Qwen/Qwen3-4B"
        )
    _refuse_pipes(directory)
    config_file = directory / CONFIG
    if not config_file.is_file():
        raise ModelError(f"{directory} has no config.json: not a Hugging Face model directory")
    config = read_json_object(config_file)
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ModelError(
            f"{directory}: model_type is {shown(model_type)}, expected one of "
            f"{', '.join(SUPPORTED_MODEL_TYPES)} (a dense Qwen3 causal language model)"
        )
    if weights:
        weight_files(directory)
    _refuse_quantized(directory, config)
    _refuse_foreign_code(config_file, config)
    _check_sizes(config_file, config)
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"{directory} has an adapter_config.json: transformers would load the adapter's base "
            "model in place of this one; merge the adapter, or move its files elsewhere"
        )
    rope_parameters(config, config_file)
    return directory


def weight_files(directory: Path) -> list[Path]:
    """Return the files that a reader loads the weights from: those of the index, else all.

    Raises:
        ModelError: there is none, or the index is damaged, or names a file that is missing or lies
            outside of the directory.
    """
    index = directory / INDEX
    if not index.is_file() or (directory / "model.safetensors").is_file():
        # A reader takes model.safetensors before an index.
        found = sorted(directory.glob("*.safetensors"))
        if not found:
            raise ModelError(f"{directory} has no *.safetensors file: the weights are missing")
        if unreadable := [path.name for path in found if not path.is_file()]:
            raise ModelError(
                f"{directory}: {shown(unreadable)}: a folder, or a link to no file; fetch the "
                "weights again"
            )
        return found
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index} has no weight_map; restore it from where the model came from")
    for name in names.values():
        is_name = isinstance(name, str) and name.endswith(".safetensors") and len(name) < 256
        if not is_name or "/" in name:
            raise ModelError(
                f"{index} names {shown(name)}, expected a *.safetensors file in its own directory; "
                "restore it from where the model came from"
            )
    files = sorted(directory / name for name in set(names.values()))
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelError(
            f"{directory} lacks {shown(missing)}, which {INDEX} names: the weights are missing"
        )
    return files


def _refuse_pipes(directory: Path) -> None:
    """Refuse what a reader would wait for without an end: pipes, sockets and devices."""
    for path in (path for path in directory.iterdir() if path.suffix in _READ):
        try:
            mode = path.stat().st_mode
        except OSError:  # a link to nothing; who needs the file says so
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ModelError(
                f"{directory}: {shown(path.name)} is a pipe, a socket or a device, expected files; "
                "remove it"
            )


def _refuse_quantized(directory: Path, config: dict[str, Any]) -> None:
    """Refuse weights in a form that neither PyTorch here nor the servers' FP8 reads."""
    settings = config.get("quantization_config", config.get("compression_config"))
    other = next((name for name in _QUANTIZED_BY_FILE if (directory / name).exists()), None)
    if settings is None and other is None:
        return
    method: Any = other
    if settings is not None:
        if not isinstance(settings, dict):
            raise ModelError(
                f"{directory / CONFIG}: quantization_config is {shown(settings)}, expected an "
                "object; restore it from where the model came from"
            )
        method = settings.get("quant_method")
        if method == "fp8" and other is None:
            return
        if is_compressed_tensors(config.get("quantization_config")) and other is None:
            _refuse_other_compression(directory, settings)
            return
    raise ModelError(
        f"{directory}: its weights are quantized ({shown(method)}), expected bfloat16 or float32 "
        "weights or, for a teacher in SGLang, an FP8 checkpoint (quant_method fp8, or "
        "compressed-tensors with a scale per channel); give the "
        "unquantized model, e.g. Qwen/Qwen3-8B in place of Qwen/Qwen3-8B-AWQ, or its FP8 "
        "checkpoint, e.g. Qwen/Qwen3-8B-FP8. A teacher in SGLang with scoring.quantization=fp8 is "
        "quantized while it loads"
    )


def _refuse_other_compression(directory: Path, settings: dict[str, Any]) -> None:
    """Refuse what compressed-tensors describes besides FP8 with a scale per output channel."""
    if faults := channel_faults(settings):
        raise ModelError(
            f"{directory / CONFIG}: its weights are quantized by compressed-tensors in a form that "
            f"is not read: quantization_config.{faults[0]}. Of compressed-tensors is read: FP8 "
            "weights with a static scale per channel, activations scaled per token while "
            "computing, all linear layers but lm_head (llm-compressor's FP8_DYNAMIC); give such a "
            "checkpoint, which docs/guide/teachers.md makes of the unquantized model, or that model"
        )


def _refuse_foreign_code(config_file: Path, config: dict[str, Any]) -> None:
    """Refuse an attention that transformers would fetch from the hub as a compiled kernel."""
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        if config.get(key) not in _ATTENTION:
            raise ModelError(
                f"{config_file}: {key} is {shown(config[key])}, which would be code from "
                "elsewhere; remove it"
            )
    if config.get("auto_map") is not None:
        raise ModelError(
            f"{config_file}: auto_map names code in the directory, and none is run; remove it, or "
            "give a model that needs none"
        )


def _check_sizes(config_file: Path, config: dict[str, Any]) -> None:
    for key, largest in _SIZES.items():
        value = config.get(key, 1)
        if type(value) is not int or not 1 <= value <= largest:
            raise ModelError(
                f"{config_file} cannot be read: {key} is {shown(value)}, expected a whole number "
                f"from 1 to {largest:,}; restore it from where the model came from"
            )
    for key in ("tie_word_embeddings", "attention_bias", "use_sliding_window"):
        if type(config.get(key, False)) is not bool:
            raise ModelError(
                f"{config_file} cannot be read: {key} is {shown(config[key])}, expected true or "
                "false; restore it from where the model came from"
            )
