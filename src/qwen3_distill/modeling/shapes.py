"""The shape of a Qwen3 model, and the parameter and byte counts that follow. No torch."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_distill.errors import ConfigError, ModelError
from qwen3_distill.modeling.fp8_checkpoint import channel_faults, is_compressed_tensors
from qwen3_distill.utils.json_text import read_json_object
from qwen3_distill.utils.shown import shown

_FP8_BLOCK = 128
"""Rows and columns that share a scale in Qwen's FP8 checkpoints."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Numbers of a dense Qwen3 model's ``config.json`` that determine its size."""

    name: str
    """A directory, or one of `QWEN3_SHAPES`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    """Whether embedding and output head are one matrix."""
    context_length: int
    fp8_checkpoint: bool = False
    """Whether the linear layers are stored in FP8."""
    fp8_per_channel: bool = False
    """Whether such a checkpoint has a scale per output channel; else one per block of 128 x 128."""

    @property
    def query_size(self) -> int:
        """Heads times their size."""
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Key-value heads times their size."""
        return self.num_kv_heads * self.head_dim

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer of one block."""
        queries, keys = self.query_size, self.key_size
        width, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (queries, width),
            "k_proj": (keys, width),
            "v_proj": (keys, width),
            "o_proj": (width, queries),
            "gate_proj": (inner, width),
            "up_proj": (inner, width),
            "down_proj": (width, inner),
        }

    @property
    def linear_parameters(self) -> int:
        """Parameters of the linear layers of all blocks: those that FP8 quantization halves."""
        return self.num_layers * sum(
            rows * columns for rows, columns in self.linear_layers.values()
        )

    @property
    def embedding_parameters(self) -> int:
        """Parameters of embedding and output head, counted once if they are tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def norm_parameters(self) -> int:
        """Parameters of the norms: two per block, two of queries and keys, and the final one."""
        return self.num_layers * (2 * self.hidden_size + 2 * self.head_dim) + self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters; tied matrices count once."""
        return self.linear_parameters + self.embedding_parameters + self.norm_parameters

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of all weights at ``itemsize`` bytes each."""
        return self.num_parameters * itemsize

    def fp8_weight_bytes(self, itemsize: int) -> int:
        """Bytes with linear layers in FP8 with float32 scales, the rest at ``itemsize`` each."""
        scales = self.num_layers * sum(
            rows if self.fp8_per_channel else _ceil(rows, _FP8_BLOCK) * _ceil(columns, _FP8_BLOCK)
            for rows, columns in self.linear_layers.values()
        )
        rest = self.embedding_parameters + self.norm_parameters
        return self.linear_parameters + 4 * scales + itemsize * rest

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    def lora_parameters(self, rank: int, target_modules: Collection[str]) -> int:
        """Parameters of adapters on the named linear layers of every block."""
        return self.num_layers * sum(
            rank * (rows + columns)
            for name, (rows, columns) in self.linear_layers.items()
            if name in target_modules
        )

    def merged_parameters(self, target_modules: Collection[str]) -> int:
        """Parameters of the named linear layers themselves, which merging recomputes."""
        return self.num_layers * sum(
            rows * columns
            for name, (rows, columns) in self.linear_layers.items()
            if name in target_modules
        )


def _qwen3(
    name: str,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    tied: bool,
) -> ModelShape:
    return ModelShape(
        name=f"Qwen3-{name}",
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        tied=tied,
        context_length=40960,
    )


QWEN3_SHAPES = {
    "0.6B": _qwen3(
        "0.6B", hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, tied=True
    ),
    "1.7B": _qwen3(
        "1.7B", hidden_size=2048, intermediate_size=6144, num_layers=28, num_heads=16, tied=True
    ),
    "4B": _qwen3(
        "4B", hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32, tied=True
    ),
    "8B": _qwen3(
        "8B", hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32, tied=False
    ),
    "14B": _qwen3(
        "14B", hidden_size=5120, intermediate_size=17408, num_layers=40, num_heads=40, tied=False
    ),
    "32B": _qwen3(
        "32B", hidden_size=5120, intermediate_size=25600, num_layers=64, num_heads=64, tied=False
    ),
}
"""The dense Qwen3 models."""


def named_shape(name: str) -> ModelShape:
    """Return a shape of `QWEN3_SHAPES`; ``32B-FP8`` is the FP8 checkpoint of ``32B``.

    Raises:
        ConfigError: there is no such shape.
    """
    base, dash, suffix = name.partition("-")
    if base not in QWEN3_SHAPES or (dash and suffix.upper() != "FP8"):
        raise ConfigError(
            f"shape {name!r}: expected one of {', '.join(QWEN3_SHAPES)}, "
            "or one of them with -FP8 for an FP8 checkpoint"
        )
    shape = QWEN3_SHAPES[base]
    if not dash:
        return shape
    return ModelShape(**(vars(shape) | {"name": f"{shape.name}-FP8", "fp8_checkpoint": True}))


def read_shape(directory: str | Path) -> ModelShape:
    """Read the shape from a model directory's ``config.json``; its weights are not needed.

    Raises:
        ModelError: the file or one of the keys is missing.
    """
    file = Path(directory) / "config.json"
    try:
        values = read_json_object(file)
        return _from_config(str(directory), values)
    except FileNotFoundError:
        raise ModelError(
            f"{file} does not exist (working directory {Path.cwd()}): the memory plan needs the "
            "model's shape; give the path of a Hugging Face model directory"
        ) from None
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ModelError(
            f"{file} does not hold the shape of a dense Qwen3 model: {error!r}"
        ) from error


def _from_config(name: str, values: dict[str, Any]) -> ModelShape:
    quantization = values.get("quantization_config")
    return ModelShape(
        name=name,
        vocab_size=_count(values, "vocab_size"),
        hidden_size=_count(values, "hidden_size"),
        intermediate_size=_count(values, "intermediate_size"),
        num_layers=_count(values, "num_hidden_layers"),
        num_heads=_count(values, "num_attention_heads"),
        num_kv_heads=_count(values, "num_key_value_heads"),
        head_dim=_count(values, "head_dim"),
        tied=bool(values["tie_word_embeddings"]),
        context_length=_count(values, "max_position_embeddings"),
        fp8_checkpoint=_is_fp8(name, quantization),
        fp8_per_channel=is_compressed_tensors(quantization),
    )


def _count(values: dict[str, Any], key: str) -> int:
    value = values[key]
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} is {shown(value)}, expected a whole number from 1 on")
    return value


def _is_fp8(name: str, quantization: dict[str, Any] | None) -> bool:
    if quantization is None:
        return False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    faults = channel_faults(quantization) if is_compressed_tensors(quantization) else []
    if faults or (method != "fp8" and not is_compressed_tensors(quantization)):
        raise ModelError(
            f"{name}: its weights are quantized by {method!r}{f' ({faults[0]})' if faults else ''};"
            " expected bfloat16 or float32 weights, or an FP8 checkpoint (quant_method fp8, or "
            "compressed-tensors with a scale per channel)"
        )
    return True


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
