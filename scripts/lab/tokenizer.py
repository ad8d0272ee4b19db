"""The byte tokenizer and chat format of the lab models."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

PAD, END, USER, ASSISTANT, SYSTEM = (
    "<|pad|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)
# The reserved tokens fill the vocabulary up to a multiple of 8, so that every row of the
# embedding has a token.
SPECIAL_TOKENS = (PAD, END, USER, ASSISTANT, SYSTEM, *(f"<|reserved_{i}|>" for i in range(3)))
PAD_ID, END_ID, USER_ID, ASSISTANT_ID = 256, 257, 258, 259
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
CONTEXT_LENGTH = 1024

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- '<|system|>' -}}"
    "{%- elif message['role'] == 'user' -%}{{- '<|user|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' -}}"
    "{%- else -%}{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer without merges: the id of a byte is its value."""
    alphabet = byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def byte_alphabet() -> list[str]:
    """Return the printable character that the byte-level scheme uses for each byte value."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    replacement = iter(range(256, 512))
    return [chr(byte if byte in printable else next(replacement)) for byte in range(256)]


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, and check what they load as."""
    directory.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_LENGTH,
        "padding_side": "left",
        "pad_token": PAD,
        "eos_token": END,
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_tokenizer(directory: Path) -> None:
    """Raise RuntimeError unless the directory's tokenizer maps text to bytes and back."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ascii_text = bytes(range(128)).decode()
    for text in ("17+5*3-8=", " a  b\n\tc , d .", "grün 漢字 \U0001f600", ascii_text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != list(text.encode()) or tokenizer.decode(ids) != text:
            raise RuntimeError(f"tokenizer does not round-trip {text!r}")
    chat = [{"role": "user", "content": "1+2="}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    if rendered != prompt_tokens("1+2=") or len(tokenizer) != VOCAB_SIZE:
        raise RuntimeError("chat template and training format differ")


def prompt_tokens(text: str) -> list[int]:
    """Return the ids of a user message up to the start of the assistant's turn."""
    return [USER_ID, *text.encode(), END_ID, ASSISTANT_ID]


def response_text(response: list[int]) -> str:
    """Return a finished response's text; a special token before the end stays visible."""
    body = response[:-1] if response and response[-1] == END_ID else [*response, PAD_ID]
    return "".join(chr(t) if t < 256 else "\N{REPLACEMENT CHARACTER}" for t in body)
