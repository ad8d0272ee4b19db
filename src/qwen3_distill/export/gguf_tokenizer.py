"""A Hugging Face tokenizer in the terms of a GGUF file, or the reason why it has none.

GGUF holds a byte-level BPE as its tokens, merges and the *name* of a way to split text; llama.cpp
knows the splits by name. What a name cannot say is refused here, because llama.cpp would read text
as other tokens and say nothing.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwen3_distill.data.rendering import apply_template
from qwen3_distill.errors import ModelError

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = "qwen2"
"""llama.cpp's name for the split of Qwen2, Qwen2.5 and Qwen3."""


class TokenType(IntEnum):
    """llama.cpp's kinds of tokens (``llama_token_type``)."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """The values of the ``tokenizer.*`` keys of a GGUF file."""

    pre: str
    tokens: list[str]
    """[V] one per row of the embedding."""
    types: list[int]
    """[V] `TokenType` of each."""
    merges: list[str]
    """By rank, the two sides separated by a space. May be empty: then every byte is a token."""
    eos_id: int
    eot_id: int
    """Id of the token that ends a turn; `eos_id` if the template ends turns with it."""
    eom_id: int | None
    """A third token that ends a response: llama.cpp stops there too."""
    bos_id: int | None
    pad_id: int | None
    chat_template: str | None


def gguf_tokenizer(
    tokenizer: PreTrainedTokenizerFast, *, vocab_size: int, eos_ids: Iterable[int]
) -> GgufTokenizer:
    """Express a tokenizer for GGUF.

    Args:
        vocab_size: rows of the model's embedding; those without a token become unused tokens.
        eos_ids: all ids that end a response.

    Raises:
        ModelError: GGUF cannot express the tokenizer; says what about it.
    """
    description: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model: dict[str, Any] = description["model"]
    is_bpe = model.get("type") == "BPE"
    merges = _merges(model) if is_bpe else []
    reasons = [
        *_model_reasons(model),
        *_step_reasons(description, has_merges=bool(merges)),
        *_added_token_reasons(description["added_tokens"]),
    ]
    vocab: dict[str, int] = model["vocab"] if is_bpe else {}
    tokens, types = _tokens(vocab, description["added_tokens"], vocab_size)
    if len(tokens) > vocab_size:
        reasons.append(f"it has ids up to {len(tokens) - 1}, the model only {vocab_size} rows")
    template = _chat_template(tokenizer.chat_template)
    eos_id, eot_id, others = _ends(tokenizer, template, frozenset(eos_ids))
    if len(others) > 1:
        reasons.append(f"more tokens end a response than GGUF can name: {sorted(eos_ids)}")
    if reasons:
        raise ModelError(
            f"the student's tokenizer cannot be written as GGUF: {'; '.join(reasons)}. llama.cpp "
            "would read text as other tokens. Use --to hf"
        )
    bos_id: Any = tokenizer.bos_token_id
    pad_id: Any = tokenizer.pad_token_id
    return GgufTokenizer(
        pre=QWEN2,
        tokens=tokens,
        types=types,
        merges=merges,
        eos_id=eos_id,
        eot_id=eot_id,
        eom_id=others[0] if others else None,
        bos_id=bos_id,
        pad_id=pad_id,
        chat_template=template,
    )


def _merges(model: Mapping[str, Any]) -> list[str]:
    """``tokenizers`` writes pairs; files of old versions hold them with the space already."""
    return [
        merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()
    ]


def _model_reasons(model: Mapping[str, Any]) -> list[str]:
    kind = model.get("type")
    if kind != "BPE":
        return [f"it is a {kind} model, expected byte-level BPE"]
    plain: dict[str, tuple[Any, ...]] = {
        "dropout": (None, 0.0),
        "unk_token": (None,),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
        "byte_fallback": (None, False),
        "ignore_merges": (None, False),
    }
    reasons = [
        f"its BPE model has {key}={model[key]!r}"
        for key, allowed in plain.items()
        if model.get(key) not in allowed
    ]
    missing = sorted(set(bytes_to_unicode().values()) - set(model["vocab"]))
    if missing:
        reasons.append(f"{len(missing)} of the 256 bytes have no token")
    return reasons


def _step_reasons(description: Mapping[str, Any], *, has_merges: bool) -> list[str]:
    """The text steps before and after the tokenizer's model."""
    reasons: list[str] = []
    # llama.cpp does not normalize; its own converter takes NFC as given, and so does this one.
    if description["normalizer"] not in (None, {"type": "NFC"}):
        reasons.append(f"its normalizer is {_short(description['normalizer'])}, expected NFC")
    if not _splits_like_qwen2(description["pre_tokenizer"], has_merges=has_merges):
        reasons.append(
            f"it splits text by {_short(description['pre_tokenizer'])}, expected Qwen2's way"
        )
    if not _adds_nothing(description["post_processor"]):
        reasons.append(
            f"its post-processor {_short(description['post_processor'])} may add tokens to a text"
        )
    return reasons


def _adds_nothing(post_processor: Mapping[str, Any] | None) -> bool:
    if post_processor is None or post_processor["type"] == "ByteLevel":
        return True
    return post_processor["type"] == "TemplateProcessing" and all(
        "Sequence" in piece for piece in post_processor["single"]
    )


def _splits_like_qwen2(pre_tokenizer: Mapping[str, Any] | None, *, has_merges: bool) -> bool:
    """Whether llama.cpp's ``qwen2`` gives the same tokens.

    Without merges every byte is a token of its own, however text is split.
    """
    if pre_tokenizer is None:
        return False
    steps: Sequence[Mapping[str, Any]] = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return False
    if not has_merges:
        return all(step["type"] in ("ByteLevel", "Split") for step in steps)
    return not last.get("use_regex", True) and [
        (step["type"], step.get("pattern"), step.get("behavior"), step.get("invert"))
        for step in steps[:-1]
    ] == [("Split", {"Regex": _QWEN2_SPLIT}, "Isolated", False)]


def _added_token_reasons(added: Iterable[Mapping[str, Any]]) -> list[str]:
    reasons: list[str] = []
    for flag in ("lstrip", "rstrip", "single_word"):
        named = [token["content"] for token in added if token.get(flag)]
        if named:
            reasons.append(f"added tokens with {flag}, such as {named[0]!r}")
    return reasons


def _tokens(
    vocab: Mapping[str, int], added: Iterable[Mapping[str, Any]], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Tokens and types by id, padded to ``vocab_size`` as llama.cpp's converter does."""
    by_id = {index: (token, TokenType.NORMAL) for token, index in vocab.items()}
    for token in added:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        by_id[token["id"]] = (token["content"], kind)
    size = max(vocab_size, *(index + 1 for index in by_id)) if by_id else vocab_size
    listed = [by_id.get(index, (f"[PAD{index}]", TokenType.UNUSED)) for index in range(size)]
    return [token for token, _ in listed], [int(kind) for _, kind in listed]


def _chat_template(template: Any) -> str | None:
    """Return the chat template, the default one if there are several."""
    if isinstance(template, Mapping):
        return template.get("default")
    return template


def _ends(
    tokenizer: PreTrainedTokenizerFast, template: str | None, eos_ids: frozenset[int]
) -> tuple[int, int, list[int]]:
    """Ids that end a response: the tokenizer's own, the one that ends a turn, and the others.

    Templates may name the tokenizer's own, so it stays what it is.
    """
    turn = _end_of_turn(tokenizer, template, eos_ids)
    own = tokenizer.eos_token_id
    if own not in eos_ids:
        own = min(eos_ids) if turn is None else turn
    end_of_turn = own if turn is None else turn
    return own, end_of_turn, sorted(eos_ids - {own, end_of_turn})


def _end_of_turn(
    tokenizer: PreTrainedTokenizerFast, template: str | None, eos_ids: frozenset[int]
) -> int | None:
    """The last id that ends a response in a rendered answer."""
    if template is None:
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = str(apply_template(tokenizer, messages, tokenize=False, chat_template=template))
    except (TemplateError, TypeError, ValueError):
        return None
    ids = tokenizer.encode(text, add_special_tokens=False)
    return next((index for index in reversed(ids) if index in eos_ids), None)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
