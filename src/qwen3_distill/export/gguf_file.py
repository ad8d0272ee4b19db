"""A Qwen3 directory written as one GGUF file, tensor by tensor.

Follows llama.cpp's own converter: matrices in the chosen type, norms in float32, a tied output
head left out. The ``gguf`` package is an optional extra and imported here only when it is used.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from qwen3_distill.errors import EngineStartError, ModelError
from qwen3_distill.export.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from qwen3_distill.modeling.directory import check_model_dir, weight_files
from qwen3_distill.modeling.loading import load_identity, load_model_config, load_tokenizer

Quant: TypeAlias = Literal["f16", "q8_0"]

_F16_MAX = 65504.0


def require_gguf() -> Any:
    """The ``gguf`` package.

    Raises:
        EngineStartError: it is not installed.
    """
    try:
        import gguf  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        raise EngineStartError(
            "--to gguf needs the package gguf, which is not installed; install it with "
            "`pip install 'qwen3-distill[gguf]'`"
        ) from None
    return gguf


def check_expressible(model_dir: Path) -> GgufTokenizer:
    """The directory's tokenizer for GGUF.

    Raises:
        ModelError: llama.cpp's qwen3 has no form for the model or its tokenizer.
    """
    directory = check_model_dir(model_dir)
    config = load_model_config(Path(directory))
    rope: dict[str, Any] = config.rope_parameters
    reasons = [
        f"{name}={value!r}"
        for name, value, plain in (
            ("hidden_act", config.hidden_act, "silu"),
            ("attention_bias", config.attention_bias, False),
            ("use_sliding_window", config.use_sliding_window, False),
            ("rope_type", rope.get("rope_type", "default"), "default"),
        )
        if value != plain
    ]
    if reasons:
        raise ModelError(
            f"{directory} cannot be written as GGUF: its config has {', '.join(reasons)}, which "
            "llama.cpp's qwen3 cannot express or this command cannot check. Use --to hf"
        )
    return gguf_tokenizer(
        load_tokenizer(directory),
        vocab_size=config.vocab_size,
        eos_ids=load_identity(directory).eos_ids,
    )


def write_gguf(
    model_dir: Path, target: Path, *, quant: Quant, name: str, tokenizer: GgufTokenizer
) -> None:
    """Write the directory's model to ``target``. One tensor is held at a time.

    Args:
        name: of the model, for people.

    Raises:
        ModelError: a tensor that qwen3 does not have, or a value beyond the range of float16.
    """
    gguf = require_gguf()
    config: Any = load_model_config(Path(model_dir))
    writer = _writer(gguf, target)
    try:
        _add_model(gguf, writer, config, quant=quant, name=name)
        _add_tokenizer(writer, tokenizer)
        planned = list(_planned(gguf, model_dir, config, quant))
        for tensor_name, _, _, shape, kind in planned:
            block, width = gguf.GGML_QUANT_SIZES[kind]
            num_bytes = int(np.prod(shape)) // block * width
            writer.add_tensor_info(tensor_name, shape, np.dtype(np.float32), num_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, source, key, _, kind in planned:
            with safe_open(source, framework="pt") as handle:
                writer.write_tensor_data(_encoded(gguf, handle.get_tensor(key), kind, key))
    finally:
        writer.close()


def as_stored(tensor: Tensor, quant: Quant) -> Tensor:
    """The values that a reader of the file gets for a weight, in float32."""
    gguf = require_gguf()
    values = tensor.detach().float().numpy()
    kind = _tensor_type(gguf, values.shape, quant)
    stored = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    return torch.from_numpy(np.ascontiguousarray(stored, dtype=np.float32))


def _writer(gguf: Any, target: Path) -> Any:
    class Writer(gguf.GGUFWriter):
        """Writes empty arrays too: a vocabulary of bytes has no merges, and readers want the key.

        GGUF has a form for them, which the package reads but does not write.
        """

        def _pack_val(self, val: Any, vtype: Any, *arguments: Any, **settings: Any) -> bytes:
            if vtype == gguf.GGUFValueType.ARRAY and not len(val):
                return struct.pack("<IIQ", vtype, gguf.GGUFValueType.STRING, 0)
            return super()._pack_val(val, vtype, *arguments, **settings)

    return Writer(target, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3])


def _add_model(gguf: Any, writer: Any, config: Any, *, quant: Quant, name: str) -> None:
    files = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(files[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.merges:
        writer.add_token_merges(tokenizer.merges)
    else:
        _add_empty_merges(writer)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.eot_id)
    if tokenizer.eom_id is not None:
        writer.add_eom_token_id(tokenizer.eom_id)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _add_empty_merges(writer: Any) -> None:
    gguf = require_gguf()
    writer.add_key_value(gguf.Keys.Tokenizer.MERGES, [], gguf.GGUFValueType.ARRAY)


def _planned(
    gguf: Any, model_dir: Path, config: Any, quant: Quant
) -> Iterator[tuple[str, Path, str, tuple[int, ...], Any]]:
    """(name in GGUF, file, name there, shape, type) of every tensor that is written."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for file in weight_files(model_dir):
        with safe_open(file, framework="pt") as handle:
            for key in sorted(handle.keys()):
                if key == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                name = names.get_name(key, try_suffixes=(".weight",))
                if name is None:
                    raise ModelError(f"{file}: llama.cpp's qwen3 has no tensor for {key}")
                shape = tuple(handle.get_slice(key).get_shape())
                yield name, file, key, shape, _tensor_type(gguf, shape, quant)


def _tensor_type(gguf: Any, shape: tuple[int, ...], quant: Quant) -> Any:
    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    if quant == "f16":
        return types.F16
    block, _ = gguf.GGML_QUANT_SIZES[types.Q8_0]
    return types.F16 if shape[-1] % block else types.Q8_0


def _encoded(gguf: Any, tensor: Tensor, kind: Any, key: str) -> np.ndarray:
    values = tensor.float().numpy()
    largest = float(np.abs(values).max())
    if kind == gguf.GGMLQuantizationType.F16 and not largest <= _F16_MAX:
        raise ModelError(
            f"{key} has a value of magnitude {largest:g}, beyond float16's {_F16_MAX:g}. "
            "Use --to hf"
        )
    return gguf.quants.quantize(values, kind)
