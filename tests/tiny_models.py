"""Random Qwen3 models of a few thousand parameters, written as Hugging Face directories."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = 256 + len(SPECIAL)
EOS_ID = 257
CONTEXT_LENGTH = 1024
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message.role != 'assistant' else '<|assistant|>' }}"
    "{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class TinyModels:
    """Directories of two models that may be distilled into one another."""

    student: Path
    teacher: Path


def write_tiny_models(directory: Path) -> TinyModels:
    """A tied student and an untied teacher of another width."""
    student, teacher = directory / "student", directory / "teacher"
    write_model(student, seed=0, tie_word_embeddings=True)
    write_model(teacher, seed=1, tie_word_embeddings=False, hidden_size=48)
    return TinyModels(student=student, teacher=teacher)


def write_model(directory: Path, *, seed: int, **overrides: Any) -> Path:
    """One random model with its tokenizer; ``overrides`` go into the `Qwen3Config`."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,  # the smallest that every engine has a kernel for
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        "pad_token_id": 256,
        "initializer_range": 0.2,  # far from uniform, so that a wrong shift shows
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**(settings | overrides)))
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """256 bytes and four special tokens; any text round-trips."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
