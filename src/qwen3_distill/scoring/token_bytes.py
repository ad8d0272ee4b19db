"""Tokens as bytes: what each token of a tokenizer writes, and the tokens of given bytes.

Two tokenizers share nothing but the bytes of a text. Bytes, not text: a byte-level token may hold a
part of a character, which no text has.
"""

import copy
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Encoding, Tokenizer

from qwen3_distill.errors import HandshakeError
from qwen3_distill.utils.shown import shortened

PROBE = (
    "The Answer is 42.",
    " two  spaces\n\n\tand a tab ",
    "caf\u00e9 cafe\u0301 STRASSE stra\u00dfe \ufb01 \u2460 \u00c5 \u212b",
    "\u6f22\u5b57 \u0e01\u0e33 \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "x" * 40 + "1234567 +-*/= {}[]",
)
"""Texts that a tokenizer must give back byte for byte: letters in both cases, white space in runs
and at the edges, characters that Unicode normal forms change, and emoji of several characters."""

_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
_CANONICAL = ("NFC", "NFD")
"""Normalizers between canonically equivalent texts. They are left out, so that bytes stay."""


class InexactTokensError(Exception):
    """A tokenizer cannot write some bytes: its tokens spell others."""


@dataclass(frozen=True)
class Encoded:
    """Tokens that write given bytes."""

    token_ids: tuple[int, ...]
    lengths: tuple[int, ...]
    """Bytes of each token; they sum to the bytes that were given."""
    stable_bytes: int
    """Bytes before the last word, 0 if there is one word only: what follows the text may change
    the tokens of its last word, and no others."""


class ByteTokenizer:
    """The bytes of every token of a tokenizer, and the tokens of any bytes.

    Added tokens (special ones, and others such as ``<think>``) write no bytes here: they are known
    by name. Text that spells such a name is text, and has other tokens.

    Args:
        tokenizer: a byte-level one, or one with byte fallback.
        name: of the model, for errors.

    Raises:
        HandshakeError: its tokens have no bytes of their own, or it changes text.
    """

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self._name = name
        description = json.loads(tokenizer.to_str())
        self.added: Mapping[int, str] = {
            int(token["id"]): str(token["content"]) for token in description["added_tokens"]
        }
        """By id, the text of each added token."""
        self.special_ids = frozenset(
            int(token["id"]) for token in description["added_tokens"] if token["special"]
        )
        """Added tokens that stand for no text."""
        pieces = {
            index: piece
            for piece, index in tokenizer.get_vocab(with_added_tokens=False).items()
            if index not in self.added
        }
        self._bytes_of = _bytes_of_pieces(pieces, description["decoder"], name)
        self._id_of_byte = {
            written[0]: index
            for index, written in sorted(self._bytes_of.items(), reverse=True)
            if len(written) == 1
        }
        self._begins_longer = _begins_longer(self._bytes_of)
        self._plain = _plain_tokenizer(description, name)
        self._check_exact()

    def bytes_of(self, token_id: int) -> bytes | None:
        """Return what a token writes; None for an added token, and where there is no token."""
        return self._bytes_of.get(token_id)

    def all_bytes_of(self, token_ids: Iterable[int]) -> list[bytes | None]:
        """Return `bytes_of` each token."""
        return list(map(self._bytes_of.get, token_ids))

    def begin_longer(self, token_ids: Iterable[int]) -> list[bool]:
        """Return for each token whether a longer one begins with its bytes."""
        return list(map(self._begins_longer.__contains__, token_ids))

    def encode(self, data: bytes) -> Encoded:
        """Tokenize bytes as text that holds no added token; where they are no UTF-8, one by one.

        Raises:
            InexactTokensError: the tokens would write other bytes.
        """
        (found,) = self.encode_all([data])
        if isinstance(found, InexactTokensError):
            raise found
        return found

    def encode_all(self, datas: Sequence[bytes]) -> list[Encoded | InexactTokensError]:
        """`encode` each of several texts, on all cores; return the error of one that fails."""
        runs = [list(_utf8_runs(data)) for data in datas]
        texts = [run.decode() for own in runs for run, is_text in own if is_text]
        encodings = iter(self._encodings(texts))
        found: list[Encoded | InexactTokensError] = []
        for data, own in zip(datas, runs, strict=True):
            parts = [(run, next(encodings) if is_text else None) for run, is_text in own]
            try:
                found.append(self._joined(data, parts))
            except InexactTokensError as error:
                found.append(error)
        return found

    def _joined(
        self, data: bytes, parts: Sequence[tuple[bytes, Encoding | InexactTokensError | None]]
    ) -> Encoded:
        """Join the tokens of a text's parts; a part that is no UTF-8 has no encoding."""
        ids: list[int] = []
        stable = start = 0
        for run, encoding in parts:
            if isinstance(encoding, InexactTokensError):
                raise encoding
            if encoding is None:
                found = [self._byte(value) for value in run]
                stable = start
            else:
                found = encoding.ids
                last_word = self.all_bytes_of(found[_last_word(encoding, len(found)) :])
                stable = start + len(run) - sum(len(part or b"") for part in last_word)
            ids += found
            start += len(run)
        written = [part or b"" for part in self.all_bytes_of(ids)]
        if b"".join(written) != data:
            raise InexactTokensError(
                f"{shortened(repr(data))} becomes tokens of {self._name} that write "
                f"{shortened(repr(b''.join(written)))}"
            )
        return Encoded(tuple(ids), tuple(map(len, written)), stable)

    def _encodings(self, texts: Sequence[str]) -> list[Encoding | InexactTokensError]:
        try:
            return [*self._plain.encode_batch([*texts], add_special_tokens=False)]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # noqa: BLE001 - of one of them; tokenizers panics, too
            return [self._encoding(text) for text in texts]

    def _encoding(self, text: str) -> Encoding | InexactTokensError:
        try:
            return self._plain.encode(text, add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - plain Exception, and panics
            return InexactTokensError(
                f"{self._name} has no tokens for {shortened(repr(text))}: {_reason(error)}"
            )

    def _byte(self, value: int) -> int:
        found = self._id_of_byte.get(value)
        if found is None:
            raise InexactTokensError(f"{self._name} has no token for the single byte {value:#04x}")
        return found

    def _check_exact(self) -> None:
        for text in PROBE:
            try:
                self.encode(text.encode())
            except InexactTokensError as error:
                raise HandshakeError(
                    f"the tokenizer of {self._name} changes text or lacks tokens: {error}. "
                    "Scores could not be lined up with the student's tokens; use a teacher whose "
                    "tokenizer gives every text back byte for byte"
                ) from None


def _plain_tokenizer(description: Mapping[str, Any], name: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(_without_additions(description)))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and panics
        raise HandshakeError(
            f"the tokenizer of {name} cannot be used without its added tokens: {_reason(error)}; "
            "use a teacher with another tokenizer"
        ) from error


def _reason(error: BaseException) -> str:
    return shortened(str(error)) or type(error).__name__


def byte_of_letter() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in set(printable))
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def _bytes_of_pieces(pieces: Mapping[int, str], decoder: Any, name: str) -> dict[int, bytes]:
    """Return what each piece of a vocabulary writes, as its decoder would."""
    steps = _steps(decoder, "decoders")
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        table = byte_of_letter()
        return {
            index: bytes(table[letter] for letter in piece)
            for index, piece in pieces.items()
            if all(letter in table for letter in piece)
        }
    if "ByteFallback" in kinds:
        spaces = [step for step in steps if step["type"] in ("Replace", "Metaspace")]
        return {index: _fallback_bytes(piece, spaces) for index, piece in pieces.items()}
    raise HandshakeError(
        f"the tokenizer of {name} is neither byte-level nor has it byte fallback (its decoder: "
        f"{', '.join(sorted(kinds)) or 'none'}), so its tokens have no bytes of their own and "
        "scores cannot be lined up; use a teacher with such a tokenizer"
    )


def _fallback_bytes(piece: str, spaces: list[dict[str, Any]]) -> bytes:
    if _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(piece[3:5])
    for step in spaces:
        if step["type"] == "Metaspace":
            piece = piece.replace(step["replacement"], " ")
        elif "String" in step["pattern"]:
            piece = piece.replace(step["pattern"]["String"], step["content"])
    return piece.encode()


def _without_additions(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer that adds nothing to a text, looks for no added token and keeps bytes."""
    plain = copy.deepcopy(dict(description))
    plain |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    kept = [
        step
        for step in _steps(plain["normalizer"], "normalizers")
        if step["type"] not in (*_CANONICAL, "Prepend")  # it puts a space before the text
    ]
    plain["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for step in _steps(plain["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
    return plain


def _steps(part: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """Return the steps of a tokenizer's part, those of sequences within sequences too."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for member in part[members] for step in _steps(member, members)]


def _last_word(encoding: Encoding, num_tokens: int) -> int:
    """Return the index of the first token of the last word."""
    last = num_tokens - 1
    # Not `word_ids`, a list of all tokens' words: only the last ones are looked at.
    while last > 0 and encoding.token_to_word(last - 1) == encoding.token_to_word(last):
        last -= 1
    return max(last, 0)


def _begins_longer(bytes_of: Mapping[int, bytes]) -> frozenset[int]:
    """Return the tokens whose bytes begin a longer one's."""
    texts = sorted({written for written in bytes_of.values() if written})
    # Of all longer texts that begin with one, the first in order stands right behind it.
    begin = {one for one, after in itertools.pairwise(texts) if after.startswith(one)}
    return frozenset(index for index, written in bytes_of.items() if written in begin)


def _utf8_runs(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Split bytes into runs that are UTF-8 and runs that are not, each with whether it is."""
    while data:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            if error.start:
                yield data[: error.start], True
            yield data[error.start : error.end], False
            data = data[error.end :]
        else:
            yield data, True
            return


def ends_within_character(data: bytes) -> bool:
    """Whether bytes end with the beginning of a UTF-8 character that more bytes would complete."""
    for length in range(1, min(4, len(data) + 1)):
        tail = data[-length:]
        if tail[0] & 0xC0 != 0x80:  # the first byte of a character
            try:
                tail.decode()
            except UnicodeDecodeError as error:
                return error.reason == "unexpected end of data"
            return False
    return False
