"""Checks and loads Qwen3 model directories and reads their identity."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from qwen3_distill.errors import ConfigError, ModelError
from qwen3_distill.modeling.config_file import CONFIG, read_json_object
from qwen3_distill.modeling.cpu_warmup import settle_vector_math
from qwen3_distill.modeling.directory import check_model_dir
from qwen3_distill.modeling.fp8_checkpoint import is_per_channel
from qwen3_distill.modeling.weight_headers import check_weight_headers
from qwen3_distill.types import ModelIdentity
from qwen3_distill.utils.shown import shortened, shown

_IDENTITY_FILES = (".json", ".jinja", ".txt", ".model")
"""Endings of the files that a config and a tokenizer are read from."""


def resolve_device(name: str) -> torch.device:
    """Return the device of a config's name; ``auto`` is CUDA if there is a GPU, else the CPU.

    On CUDA it disables cuDNN's attention in this process, before a model is compiled with it.
    PyTorch prefers it on Hopper and Blackwell, but it builds a plan for every batch size and
    length, which takes tens of milliseconds on the host, and responses hardly ever repeat a shape.

    Raises:
        ConfigError: the name is ``cuda`` and there is no CUDA device.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(
            "device=cuda, but PyTorch sees no CUDA device; use device=auto or cpu, or install a "
            "CUDA build of torch"
        )
    if name == "cpu" or not available:
        return torch.device("cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda")


def allow_cudnn_attention() -> None:
    """Undo what `resolve_device` disables, for attention that pads lengths to a few sizes."""
    torch.backends.cuda.enable_cudnn_sdp(True)


def resolve_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_model(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model in evaluation mode.

    Raises:
        ModelError: the directory does not hold a complete Qwen3 model.
    """
    directory = check_model_dir(path)
    if is_per_channel(read_json_object(directory / CONFIG).get("quantization_config")):
        raise ModelError(
            f"{directory} is an FP8 checkpoint with a scale per channel, which SGLang and vLLM "
            "serve and PyTorch here does not load; give the unquantized model"
        )
    check_weight_headers(directory)  # before a model of its config's sizes is made
    settle_vector_math()
    config = load_model_config(directory, attention="sdpa")  # never what the directory asks for
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds, by what is wrong
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        raise ModelError(f"{directory}: cannot be loaded: {shortened(str(error))}") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers draws missing weights at random and only warns.
        raise ModelError(f"{directory}: weights are missing: {', '.join(missing[:5])} ...")
    if mismatched := sorted(map(str, info.get("mismatched_keys", ()))):
        raise ModelError(f"{directory}: weights of another size: {shown(mismatched)}")
    loaded_model = model.to(device).eval()
    _require_finite(directory, loaded_model)
    if loaded_model.config.tie_word_embeddings != is_tied(loaded_model):
        # transformers 5 leaves a stored head that differs apart, other readers do not.
        raise ModelError(
            f"{directory / CONFIG}: tie_word_embeddings is true, but the stored output head and "
            "embedding are two matrices; set it to false, or restore the weights"
        )
    return loaded_model


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the output head is the embedding itself."""
    embedding: Any = model.get_input_embeddings()
    return output_head(model) is embedding.weight


def _require_finite(directory: Path, model: PreTrainedModel) -> None:
    """Raise if a weight is NaN or infinite: one number of each tensor is read from the device."""
    names, largest = list[str](), list[torch.Tensor]()
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.element_size() > 1:
            names.append(name)
            largest.append(torch.linalg.vector_norm(weight.detach(), ord=torch.inf).float())
    finite = torch.stack(largest).isfinite().tolist()
    if bad := [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]:
        raise ModelError(f"{directory}: weights are not finite: {shown(bad)}; fetch it again")


def output_head(model: PreTrainedModel) -> torch.Tensor:
    """[V, D] weight of the output head; the embedding itself if the two are tied."""
    head: Any = model.get_output_embeddings()
    return head.weight


def load_tokenizer(path: str | Path, *, weights: bool = True) -> PreTrainedTokenizerFast:
    """Load the directory's fast tokenizer.

    Args:
        weights: False: the directory's weights may be missing.

    Raises:
        ModelError: the directory has none.
    """
    directory = check_model_dir(path, weights=weights)
    if not (directory / "tokenizer.json").is_file():
        # transformers would make up an empty tokenizer from the model type, without a warning.
        raise ModelError(f"{directory} has no tokenizer.json: needs a fast tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        tokenizer.encode("x")  # some settings of another type fail only here
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and panics
        reason = shortened(str(error)) or type(error).__name__
        raise ModelError(f"{directory}: no usable tokenizer: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"{directory}: needs a fast tokenizer, has {type(tokenizer).__name__}")
    return tokenizer


def load_model_config(directory: Path, attention: Literal["eager", "sdpa"] | None = None) -> Any:
    """Read a model directory's config as transformers does.

    Args:
        attention: of the layers that are built from it; None: transformers' choice.

    Raises:
        ModelError: transformers does not take it.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        # After reading: a directory's own `_attn_implementation` would win over an argument.
        config._attn_implementation = attention
        return config
    except Exception as error:  # transformers raises many kinds, by what is wrong
        reason = shortened(" ".join(str(error).split()))
        raise ModelError(f"{directory / CONFIG} cannot be read: {reason}") from error


def load_identity(path: str | Path, *, weights: bool = True) -> ModelIdentity:
    """Read from a model directory what another model must share with it.

    An unchanged directory is read once per process: a start asks for it from a dozen places.

    Args:
        weights: False: the directory's weights may be missing.

    Raises:
        ModelError: config, tokenizer or generation config are missing or damaged.
    """
    directory = check_model_dir(path, weights=weights)
    return _identity_of(directory, _file_states(directory))


def _file_states(directory: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Return name, inode, size and time of the files that an identity is read from."""
    files = [*directory.glob("*"), *directory.glob("additional_chat_templates/*")]
    read = [file for file in sorted(files) if file.suffix in _IDENTITY_FILES and file.is_file()]
    stats = [(file, file.stat()) for file in read]
    return tuple((str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in stats)


@cache
def _identity_of(directory: Path, states: tuple[tuple[str, int, int, int], ...]) -> ModelIdentity:
    config = load_model_config(directory)
    tokenizer = load_tokenizer(directory, weights=False)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"{directory}: its tokenizer has {len(tokenizer)} tokens, more than the "
            f"{config.vocab_size} of the model's vocabulary; they are of two models"
        )
    return ModelIdentity(
        name=str(directory),
        tokenizer_digest=tokenizer_digest(tokenizer),
        vocab_size=int(config.vocab_size),
        eos_ids=_eos_ids(directory, config, tokenizer),
        chat_template_digest=_sha256(str(tokenizer.chat_template)),
        context_length=int(config.max_position_embeddings),
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a digest of the mapping between text and token ids."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    for transient in ("padding", "truncation"):  # changed by use; not part of the mapping
        description.pop(transient, None)
    return _sha256(json.dumps(description, sort_keys=True))


def _eos_ids(directory: Path, config: Any, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """All ids that end a response: generation_config's, else the model config's, else the
    tokenizer's."""
    eos: Any = None
    file = directory / "generation_config.json"
    if file.is_file():
        eos = read_json_object(file).get("eos_token_id")
        try:
            GenerationConfig.from_pretrained(directory)  # as every engine does later
        except Exception as error:  # transformers raises many kinds, by what is wrong
            reason = shortened(str(error))
            raise ModelError(f"{file} cannot be read: {reason}; correct it or remove it") from error
    if eos is None:
        eos = config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            f"{directory}: no eos_token_id in generation_config.json, config.json or the "
            "tokenizer; without one a rollout could never end"
        )
    ids = eos if isinstance(eos, list) else [eos]
    if not all(type(token_id) is int for token_id in ids):
        raise ModelError(
            f"{directory}: eos_token_id is {shown(eos)}, expected a token id or some of them"
        )
    if not any(0 <= token_id < config.vocab_size for token_id in ids):
        raise ModelError(
            f"{directory}: eos_token_id is {shown(sorted(ids))}, and no such token is among the "
            f"{config.vocab_size} of the output head, so a rollout could never end; correct it in "
            "generation_config.json"
        )
    return frozenset(ids)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
