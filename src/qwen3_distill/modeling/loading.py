"""Checks and loads Qwen3 model directories and reads their identity."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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
from qwen3_distill.modeling.directory import check_model_dir, weight_files
from qwen3_distill.types import ModelIdentity
from qwen3_distill.utils.shown import shortened, shown


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


def resolve_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_model(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model in evaluation mode.

    Raises:
        ModelError: the directory does not hold a complete Qwen3 model.
    """
    directory = check_model_dir(path)
    _check_embedding(directory)
    settle_vector_math()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="sdpa",  # never what the directory asks for
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
    return model.to(device).eval()


def _check_embedding(directory: Path) -> None:
    """Compare the stored embedding with the config, before a model of its sizes is made.

    Raises:
        ModelError: it is missing, damaged, or of other sizes.
    """
    config, name = read_json_object(directory / CONFIG), "model.embed_tokens.weight"
    expected = [config.get("vocab_size"), config.get("hidden_size")]
    try:
        for file in weight_files(directory):
            with safe_open(file, framework="pt") as handle:
                if name in handle.keys():  # noqa: SIM118 - a handle is no mapping
                    found = list(handle.get_slice(name).get_shape())
                    if found != expected:
                        raise ModelError(
                            f"{directory}: {name} is of size {found}, but config.json says "
                            f"{shown(expected)}: they are of two models"
                        )
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory}: cannot be loaded: {error}") from error


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
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and panics
        reason = shortened(str(error)) or type(error).__name__
        raise ModelError(f"{directory}: no usable tokenizer: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"{directory}: needs a fast tokenizer, has {type(tokenizer).__name__}")
    return tokenizer


def load_model_config(directory: Path, **settings: Any) -> Any:
    """Read a model directory's config as transformers does.

    Raises:
        ModelError: transformers does not take it.
    """
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, **settings)
    except Exception as error:  # transformers raises many kinds, by what is wrong
        reason = shortened(" ".join(str(error).split()))
        raise ModelError(f"{directory / CONFIG} cannot be read: {reason}") from error


def load_identity(path: str | Path, *, weights: bool = True) -> ModelIdentity:
    """Read from a model directory what another model must share with it.

    Args:
        weights: False: the directory's weights may be missing.

    Raises:
        ModelError: config, tokenizer or generation config are missing or damaged.
    """
    directory = check_model_dir(path, weights=weights)
    config = load_model_config(directory)
    tokenizer = load_tokenizer(directory, weights=weights)
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
