"""A tiny model with a tokenizer like Qwen2's: byte-level BPE with merges, NFC and added tokens."""

from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import CHAT_TEMPLATE, write_model

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|user|>", "<|assistant|>")
PLAIN = ("<think>", "</think>")
"""Added tokens that are not special."""
CORPUS = (
    "The quick brown fox says it's 12 + 30 = 42, isn't it? They'll see.",
    "def add(left, right):\n    return left + right  # plus\n\n",
    "Ein schöner Tag, naïve café, 漢字 かな 🙂 и так далее ...",
)
VOCAB_SIZE = 400
"""Rows of the embedding: more than there are tokens, as in Qwen3."""


def qwen_like_tokenizer(chat_template: Any = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Trained on `CORPUS`; some sixty merges."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    backend.add_special_tokens(list(SPECIAL))
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in PLAIN])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        chat_template=chat_template and str(chat_template).replace("<|end|>", "<|im_end|>"),
        clean_up_tokenization_spaces=False,
    )


def write_bpe_model(directory: Path, **overrides: Any) -> Path:
    """A random model with that tokenizer, which stops at both of its ends."""
    tokenizer = qwen_like_tokenizer()
    ends = [tokenizer.convert_tokens_to_ids(token) for token in reversed(SPECIAL[:2])]
    write_model(
        directory,
        **{
            "seed": 3,
            "vocab_size": VOCAB_SIZE,
            "eos_token_id": ends,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.1,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
            **overrides,
        },
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(directory)
    return directory
