"""Byte-level tokenizers with given merges, and rollouts of their tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwen3_distill.scoring.special_tokens import TurnEnds, map_special_tokens
from qwen3_distill.scoring.token_bytes import ByteTokenizer, byte_of_letter
from qwen3_distill.scoring.tokenizer_alignment import OwnTokens
from qwen3_distill.types import FinishReason, Rollout
from tests.contract.builders import synthetic_rollout

LETTER_OF_BYTE = {byte: letter for letter, byte in byte_of_letter().items()}
STUDENT_SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|only the student|>")
TEACHER_SPECIAL = ("<s>", "<|eot|>", "<|user|>", "<|assistant|>")
THINK = ("<think>", "</think>")
"""Added tokens that are no special ones, as in Qwen3."""


def letters(data: bytes) -> str:
    """The letters of a byte-level vocabulary that stand for bytes."""
    return "".join(LETTER_OF_BYTE[byte] for byte in data)


def byte_level(
    merges: Sequence[tuple[bytes, bytes]] = (),
    *,
    special: Sequence[str] = STUDENT_SPECIAL,
    added: Sequence[str] = (),
    words: bool = False,
    normalizer: Any = None,
    add_prefix_space: bool = False,
) -> Tokenizer:
    """A byte-level BPE tokenizer: the id of a byte is its value, merged pieces follow.

    Args:
        words: split text into words first, as GPT-2 does.
    """
    vocab = {letters(bytes([byte])): byte for byte in range(256)}
    for left, right in merges:
        vocab.setdefault(letters(left + right), len(vocab))
    pairs = [(letters(left), letters(right)) for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=add_prefix_space, use_regex=words
    )
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """A tokenizer in the manner of SentencePiece: spaces are ``▁``, other bytes fall back."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ["▁", *map(chr, range(33, 127)), "th", "▁th", "▁▁"]:
        vocab.setdefault(piece, len(vocab))
    vocab.setdefault("<s>", len(vocab))
    merges = [("t", "h"), ("▁", "th"), ("▁", "▁")]
    model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    return tokenizer


def as_fast(
    tokenizer: Tokenizer, *, eos: str, chat_template: str | None
) -> PreTrainedTokenizerFast:
    """The tokenizer as a model directory has it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def own_tokens(
    student: Tokenizer,
    teacher: Tokenizer,
    *,
    student_end: str = "<|end|>",
    teacher_end: str = "<|eot|>",
    given: Mapping[str, str] | None = None,
) -> OwnTokens:
    """The aligner of two tokenizers, each with one token that ends an answer."""
    ours, theirs = ByteTokenizer(student, "student"), ByteTokenizer(teacher, "teacher")
    special = map_special_tokens(
        ours,
        theirs,
        student_ends=_ends(student, student_end),
        teacher_ends=_ends(teacher, teacher_end),
        given=given or {},
    )
    return OwnTokens(ours, theirs, special)


def _ends(tokenizer: Tokenizer, token: str) -> TurnEnds:
    index = tokenizer.token_to_id(token)
    assert index is not None
    return TurnEnds(of_template=index, eos_ids=frozenset({index}))


def rollout_of(
    response_ids: Sequence[int], finish_reason: FinishReason = FinishReason.STOP
) -> Rollout:
    """A rollout with this response, all sampled."""
    made = synthetic_rollout(4, len(response_ids))
    return replace(made, response_ids=np.array(response_ids), finish_reason=finish_reason)
