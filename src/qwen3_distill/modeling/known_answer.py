"""The known answer: logprobs of fixed tokens, computed from a model directory one layer at a time.

A served teacher is checked against it. Weights are read when needed, in float32 on the CPU: the
embeddings of a few tokens, then layer after layer, then the output head in chunks of rows. The
answer of a 32B teacher thus needs the memory of one layer and no GPU.

Shape letters: T tokens, D hidden size, V vocabulary, C rows of a chunk of the output head.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from qwen3_distill.errors import ModelError
from qwen3_distill.modeling.cpu_warmup import settle_vector_math
from qwen3_distill.modeling.digest import directory_digest
from qwen3_distill.modeling.directory import check_model_dir, weight_files
from qwen3_distill.modeling.fp8_checkpoint import is_per_channel
from qwen3_distill.modeling.loading import load_model_config, load_tokenizer
from qwen3_distill.modeling.weight_headers import check_weight_headers
from qwen3_distill.types import FloatArray, IntArray
from qwen3_distill.utils.files import write_json_atomic
from qwen3_distill.utils.json_text import read_json
from qwen3_distill.utils.paths import cache_home
from qwen3_distill.utils.shown import shortened

FORMAT = 1
"""Part of a cached answer's file name; increase it when tokens or computation change."""
HEAD_ROWS = 8192
TEXT_TOKENS = 32
SPREAD_TOKENS = 32
_Scaling: TypeAlias = tuple[int, int] | Literal["channel"]
"""Rows and columns that share a scale, or ``channel``: a scale for each row."""
_TEXT = (
    "Alice has 12 boxes with 7 pencils each and gives 15 pencils away. How many are left? "
    "12 * 7 = 84, and 84 - 15 = 69. The answer is 69.\n\ndef area(w, h):\n    return w * h\n"
)


@dataclass(frozen=True)
class KnownAnswer:
    """Fixed tokens with the model's logprobs of all but the first."""

    token_ids: IntArray
    """[T]; the first is the prompt, the others are scored."""
    logprobs: FloatArray
    """[T - 1] nats."""


def known_answer(model_dir: str | Path) -> KnownAnswer:
    """Return the known answer of a model directory, from the user's cache folder if it is there.

    Raises:
        ModelError: the weights cannot be read, or are quantized in an unknown way.
    """
    directory = check_model_dir(model_dir)
    check_weight_headers(directory)
    kept = _cache_folder() / f"{directory_digest(directory)}-{FORMAT}.json"
    token_ids = known_tokens(directory)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = read_json(kept)
        if found["token_ids"] == token_ids.tolist():
            logprobs = np.array(found["logprobs"], dtype=np.float32)
            if logprobs.shape == (token_ids.size - 1,) and np.isfinite(logprobs).all():
                return KnownAnswer(token_ids, logprobs)
    answer = KnownAnswer(token_ids, layerwise_logprobs(directory, token_ids))
    with contextlib.suppress(OSError):  # the cache only saves the next start some seconds
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(
            kept, {"token_ids": token_ids.tolist(), "logprobs": answer.logprobs.tolist()}
        )
    return answer


def known_tokens(directory: Path) -> IntArray:
    """Return [T] ids: a short text, which models predict well, then ids across the vocabulary."""
    config = load_model_config(directory)
    text = load_tokenizer(directory).encode(_TEXT, add_special_tokens=False)[:TEXT_TOKENS]
    spread = np.linspace(0, config.vocab_size - 1, SPREAD_TOKENS).astype(np.int64).tolist()
    return np.array([*text, *spread][: config.max_position_embeddings], dtype=np.int32)


def _cache_folder() -> Path:
    return cache_home() / "qwen3-distill" / "known-answers"


@torch.inference_mode()
def layerwise_logprobs(model_dir: str | Path, token_ids: IntArray) -> NDArray[np.float32]:
    """Return [T - 1] nats of all tokens but the first, at temperature 1.

    Raises:
        ModelError: a weight is missing, unreadable, or quantized in an unknown way.
    """
    directory = check_model_dir(model_dir)
    check_weight_headers(directory)
    # Eager attention: only the mask below decides which tokens a token attends to.
    config: Any = load_model_config(directory, attention="eager")
    ids_T = torch.from_numpy(token_ids.astype(np.int64))
    try:
        logprobs = _logprobs(directory, config, ids_T)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # transformers raises many kinds, by what is wrong in the config
        reason = shortened(f"{type(error).__name__}: {error}")
        raise ModelError(f"{directory}: its model cannot be computed: {reason}") from error
    if not np.isfinite(logprobs).all():
        raise ModelError(
            f"{directory}: its logprobs are not finite, so a weight is NaN or infinite; fetch the "
            "model again"
        )
    return logprobs


def _logprobs(directory: Path, config: Any, ids_T: Tensor) -> NDArray[np.float32]:
    settle_vector_math()
    with _open_weights(directory, config) as weights:
        hidden_1TD = weights.rows("model.embed_tokens.weight", ids_T).unsqueeze(0)
        position_1T = torch.arange(ids_T.numel()).unsqueeze(0)
        rotary = Qwen3RotaryEmbedding(config)(hidden_1TD, position_1T)
        mask_11TT = _causal_mask(ids_T.numel())
        for index in range(config.num_hidden_layers):
            with torch.device("meta"):
                layer = Qwen3DecoderLayer(config, index)
            weights.fill(layer, f"model.layers.{index}.")
            hidden_1TD = layer(
                hidden_1TD,
                attention_mask=mask_11TT,
                position_ids=position_1T,
                position_embeddings=rotary,
            )
            del layer
        with torch.device("meta"):
            norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        weights.fill(norm, "model.norm.")
        hidden_TD = norm(hidden_1TD)[0]
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        return _target_logprobs(weights, head, hidden_TD[:-1], ids_T[1:], config.vocab_size)


def _causal_mask(length: int) -> Tensor:
    """Return [1, 1, T, T]: 0 where a token attends to another, else the lowest float."""
    lowest = torch.finfo(torch.float32).min
    return torch.full((length, length), lowest).triu(diagonal=1)[None, None]


def _target_logprobs(
    weights: "_Weights", head: str, hidden_TD: Tensor, target_T: Tensor, vocab_size: int
) -> NDArray[np.float32]:
    total_T = torch.full((len(hidden_TD),), -torch.inf)
    logit_T = torch.zeros(len(hidden_TD))
    for start in range(0, vocab_size, HEAD_ROWS):
        stop = min(start + HEAD_ROWS, vocab_size)
        logits_TC = hidden_TD @ weights.row_range(head, start, stop).T
        total_T = torch.logaddexp(total_T, logits_TC.logsumexp(dim=-1))
        here_T = (target_T >= start) & (target_T < stop)
        logit_T[here_T] = logits_TC[here_T, target_T[here_T] - start]
    return (logit_T - total_T).numpy()


@contextlib.contextmanager
def _open_weights(directory: Path, config: Any) -> Iterator["_Weights"]:
    with contextlib.ExitStack() as stack:
        try:
            files = [
                stack.enter_context(safe_open(path, framework="pt"))
                for path in weight_files(directory)
            ]
            yield _Weights(directory, files, _scaling(directory, config))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{directory}: weights cannot be read: {error}") from error


def _scaling(directory: Path, config: Any) -> _Scaling | None:
    """Return what shares a scale in an FP8 checkpoint; None if it is not quantized."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if is_per_channel(settings):
        return "channel"
    block = settings.get("weight_block_size")
    if settings.get("quant_method") != "fp8" or not block:
        raise ModelError(
            f"{directory} is quantized as {settings.get('quant_method')!r}, block size {block}; "
            "can be checked: bfloat16 or float32 weights, and FP8 with a scale per block or channel"
        )
    return int(block[0]), int(block[1])


class _Weights:
    """Reads the tensors of a directory by name, in float32."""

    def __init__(self, directory: Path, files: list[Any], scaling: _Scaling | None) -> None:
        self._directory = directory
        self._file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        self._scaling = scaling

    def fill(self, module: torch.nn.Module, prefix: str) -> None:
        """Load the weights of a module that has none."""
        state = {name: self._whole(prefix + name) for name in module.state_dict()}
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:  # a tensor of another shape
            raise ModelError(
                f"{self._directory}: weights of {prefix.rstrip('.')} do not fit config.json: "
                f"{shortened(' '.join(str(error).split()))}; restore the file that is wrong"
            ) from error

    def rows(self, name: str, ids_T: Tensor) -> Tensor:
        part = self._slice(name)
        return torch.cat([part[i : i + 1] for i in ids_T.tolist()]).float()

    def row_range(self, name: str, start: int, stop: int) -> Tensor:
        return self._slice(name)[start:stop].float()

    def _slice(self, name: str) -> Any:
        part = self._file(name).get_slice(name)
        if part.get_dtype().startswith("F8"):
            raise ModelError(f"{self._directory}: {name} is quantized, which is not expected")
        return part

    def _whole(self, name: str) -> Tensor:
        tensor = self._file(name).get_tensor(name)
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor.float()
        if self._scaling is None:
            raise ModelError(f"{self._directory}: {name} is FP8, but config.json does not say so")
        if isinstance(self._scaling, tuple):
            return dequantized(tensor, self._scale(f"{name}_scale_inv"), self._scaling)
        return tensor.float() * self._scale(f"{name}_scale")  # [outputs, 1]

    def _scale(self, name: str) -> Tensor:
        return self._file(name).get_tensor(name).float()

    def _file(self, name: str) -> Any:
        if name not in self._file_of:
            raise ModelError(f"{self._directory}: no weight {name} in its *.safetensors files")
        return self._file_of[name]


def dequantized(weight: Tensor, scale: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Return [rows, columns] float32 of an FP8 weight with one scale per block."""
    rows, columns = weight.shape
    spread = scale.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)
    return weight.float() * spread[:rows, :columns]
