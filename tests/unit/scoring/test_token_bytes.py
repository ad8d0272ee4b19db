"""Tokens as bytes: exact for any bytes, and refused where a tokenizer changes text."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from qwen3_distill.errors import HandshakeError
from qwen3_distill.scoring.token_bytes import (
    PROBE,
    ByteTokenizer,
    InexactTokensError,
    ends_within_character,
)
from tests.own_tokenizers import STUDENT_SPECIAL, THINK, byte_fallback, byte_level

FAMILY = "\U0001f468‍\U0001f469‍\U0001f467"


def pieces(data: st.DataObject, count: int) -> list[tuple[bytes, bytes]]:
    """Merges of pieces that exist, so that a tokenizer may have them."""
    known = [bytes([byte]) for byte in b" abc\xe4\xbd\xa0\xf0\x9f"]
    merges: list[tuple[bytes, bytes]] = []
    for _ in range(count):
        pair = data.draw(st.sampled_from(known)), data.draw(st.sampled_from(known))
        if pair not in merges and len(pair[0] + pair[1]) <= 8:
            merges.append(pair)
            known.append(pair[0] + pair[1])
    return merges


@settings(max_examples=40, deadline=None)
@given(st.data(), st.binary(max_size=40), st.text(max_size=20))
def test_tokens_write_the_bytes_that_they_were_made_of(
    data: st.DataObject, raw: bytes, text: str
) -> None:
    tokenizer = ByteTokenizer(byte_level(pieces(data, 8), words=data.draw(st.booleans())), "t")
    for given_bytes in (raw, text.encode(), raw + text.encode() + raw):
        encoded = tokenizer.encode(given_bytes)
        written = [tokenizer.bytes_of(index) or b"" for index in encoded.token_ids]
        assert b"".join(written) == given_bytes
        assert list(encoded.lengths) == [len(each) for each in written]
        assert 0 <= encoded.stable_bytes <= len(given_bytes)


def test_valid_text_has_the_tokens_that_the_tokenizer_itself_gives_it() -> None:
    backend = byte_level([(b"a", b"b"), (b" ", b"ab")], words=True)
    text = "ab abc  ab\n"
    ids = ByteTokenizer(backend, "t").encode(text.encode()).token_ids
    assert list(ids) == backend.encode(text, add_special_tokens=False).ids
    assert len(ids) < len(text)


def test_text_that_spells_a_special_token_is_text() -> None:
    backend = byte_level(added=THINK)
    tokenizer = ByteTokenizer(backend, "t")
    for name in (*STUDENT_SPECIAL, *THINK):
        assert backend.token_to_id(name) in backend.encode(name).ids  # as the tokenizer reads it
        assert tokenizer.encode(name.encode()).token_ids == tuple(name.encode())
        index = backend.token_to_id(name)
        assert index is not None
        assert tokenizer.bytes_of(index) is None
    assert tokenizer.special_ids == {backend.token_to_id(name) for name in STUDENT_SPECIAL}


def test_a_prefix_space_and_a_canonical_normal_form_are_left_out() -> None:
    backend = byte_level(normalizer=normalizers.NFC(), add_prefix_space=True)
    assert backend.decode(backend.encode("e\u0301").ids) == " \u00e9"
    decomposed = "e\u0301".encode()
    assert ByteTokenizer(backend, "t").encode(decomposed).token_ids == tuple(decomposed)


@pytest.mark.parametrize(
    "normalizer",
    [normalizers.Lowercase(), normalizers.NFKC(), normalizers.StripAccents(), normalizers.Strip()],
)
def test_a_tokenizer_that_changes_text_is_refused(normalizer: object) -> None:
    sequence = normalizers.Sequence([normalizers.NFD(), normalizer])
    with pytest.raises(HandshakeError, match=r"changes text.*gives every text back byte for byte"):
        ByteTokenizer(byte_level(normalizer=sequence), "t")


def test_a_tokenizer_whose_tokens_have_no_bytes_is_refused() -> None:
    words = Tokenizer(models.WordLevel(vocab={"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(HandshakeError, match="neither byte-level nor has it byte fallback"):
        ByteTokenizer(words, "t")
    words.decoder = decoders.WordPiece()
    with pytest.raises(HandshakeError, match="its decoder: WordPiece"):
        ByteTokenizer(words, "t")


def test_a_tokenizer_that_fails_at_a_text_is_refused_when_it_is_read() -> None:
    """Without an unknown piece and without bytes, the library raises a plain Exception."""
    pieces = Tokenizer(models.Unigram([("a", -1.0)], unk_id=None, byte_fallback=False))
    pieces.decoder = decoders.ByteFallback()
    with pytest.raises(HandshakeError, match=r"lacks tokens: t has no tokens for 'The Answer"):
        ByteTokenizer(pieces, "t")


def test_of_many_texts_each_has_its_own_tokens_or_its_own_error() -> None:
    letters_of_probe = sorted(set("".join(PROBE)))
    backend = Tokenizer(
        models.Unigram([(letter, -1.0) for letter in letters_of_probe], unk_id=None)
    )
    backend.decoder = decoders.ByteFallback()
    tokenizer = ByteTokenizer(backend, "t")
    texts = [b"Answer", "\u0436".encode(), b"", b"42.", b"is\xff", b"42 is"]
    found = tokenizer.encode_all(texts)
    for text, one in zip(texts, found, strict=True):
        if isinstance(one, InexactTokensError):
            with pytest.raises(InexactTokensError, match=re.escape(str(one))):
                tokenizer.encode(text)
        else:
            assert one == tokenizer.encode(text)
            assert b"".join(tokenizer.bytes_of(index) or b"" for index in one.token_ids) == text
    errors = [str(one) for one in found if isinstance(one, InexactTokensError)]
    assert len(errors) == 2
    assert errors[0].startswith("t has no tokens for '\u0436'")
    assert errors[1] == "t has no token for the single byte 0xff"


def test_a_piece_that_only_looks_like_a_byte_is_text() -> None:
    description = json.loads(byte_fallback().to_str())
    odd = ["<0xZZ>", "<0x+1>", "<0x 1>"]
    size = len(description["model"]["vocab"])
    description["model"]["vocab"] |= {piece: size + index for index, piece in enumerate(odd)}
    tokenizer = ByteTokenizer(Tokenizer.from_str(json.dumps(description)), "t")
    assert [tokenizer.bytes_of(size + index) for index in range(3)] == [p.encode() for p in odd]
    assert tokenizer.encode(b"\x01").token_ids == (1,)


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=30), st.text(max_size=20).filter(lambda text: "▁" not in text))
def test_byte_fallback_writes_any_bytes_without_a_space_before_them(raw: bytes, text: str) -> None:
    tokenizer = ByteTokenizer(byte_fallback(), "t")
    for given_bytes in (text.encode(), raw, b" the th" + raw):
        if "▁".encode() in given_bytes:
            continue
        encoded = tokenizer.encode(given_bytes)
        written = b"".join(tokenizer.bytes_of(index) or b"" for index in encoded.token_ids)
        assert written == given_bytes
    ids = tokenizer.encode(b" th").token_ids
    assert len(ids) == 1  # the merged piece, and no space of its own before it


def test_bytes_that_no_token_writes_are_an_error_and_not_other_bytes() -> None:
    with pytest.raises(InexactTokensError, match="becomes tokens of t that write"):
        ByteTokenizer(byte_fallback(), "t").encode("a▁b".encode())  # it would become a space


def test_the_last_word_is_what_following_text_may_change() -> None:
    tokenizer = ByteTokenizer(byte_level([(b"b", b"c")], words=True), "t")
    assert tokenizer.encode(b"one two bc").stable_bytes == len(b"one two")
    assert tokenizer.encode(b"bcbc").stable_bytes == 0
    assert tokenizer.encode(b"one two\xff").stable_bytes == len(b"one two")


@pytest.mark.parametrize("character", ["\u00e9", "\u4f60", "\U0001f600", FAMILY])
def test_the_beginning_of_a_character_is_told_from_bytes_that_are_none(character: str) -> None:
    data = character.encode()
    single = len(character[0].encode())
    for size in range(1, single):
        assert ends_within_character(b"ab" + data[:size])
        assert not ends_within_character(b"ab" + data[1 : 1 + size])  # no first byte
    assert not ends_within_character(b"ab" + data)
    assert not ends_within_character(b"")
    assert not ends_within_character(b"\xff")


def test_a_token_that_begins_a_longer_one_is_known() -> None:
    known = ByteTokenizer(byte_level([(b"a", b"b"), (b"ab", b"c"), (b"b", b"b")]), "t")
    begins = zip(range(259), known.begin_longer(range(259)), strict=True)
    assert {known.bytes_of(index) for index, yes in begins if yes} == {b"a", b"b", b"ab"}
    assert known.begin_longer(known.special_ids) == [False] * len(STUDENT_SPECIAL)
