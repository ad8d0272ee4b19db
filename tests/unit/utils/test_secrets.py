"""Secrets and text of others: what is hidden, what is escaped, and what stays as it is."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.utils.printable import excerpt, printable
from qwen3_distill.utils.secrets import (
    HIDDEN,
    is_secret_name,
    remember_secret,
    text_of_others,
    without_secrets,
    without_user,
)

KEY = 'sk-4f"9\\c1/e77aa0d3b6+52='
remember_secret(KEY)


@pytest.mark.parametrize(
    "text",
    [
        f"Bearer {KEY}",
        f"{KEY}{KEY}",
        KEY[:10],
        f"x{KEY[5:]}",
        json.dumps({"Authorization": f"Bearer {KEY}"}),
        repr({"a": KEY}),
        base64.b64encode(KEY.encode()).decode(),
        KEY.encode().hex(),
    ],
)
def test_a_key_is_hidden_in_every_form(text: str) -> None:
    shown = without_secrets(text)
    assert HIDDEN in shown
    assert all(KEY[at : at + 8] not in shown for at in range(len(KEY) - 7))


def test_a_key_is_hidden_before_a_text_is_shortened() -> None:
    for filler in range(580, 610):
        shown = text_of_others("x" * filler + KEY)
        assert all(KEY[at : at + 8] not in shown for at in range(len(KEY) - 7))


def test_other_text_stays() -> None:
    text = "status 500: out of memory at http://10.0.0.2:30000/generate"
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://me:pw@host:1/a", "http://(hidden)@host:1/a"),
        ("at https://tok@h, and http://a:b@c", "at https://(hidden)@h, and http://(hidden)@c"),
        ("http://host/a@b", "http://host/a@b"),
        ("mail a@b", "mail a@b"),
    ],
)
def test_users_of_urls_are_hidden(url: str, shown: str) -> None:
    assert without_user(url) == shown
    assert without_user(shown) == shown


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((n, True) for n in ("HF_TOKEN", "api_key", "WANDB_API_KEY", "hfToken", "db-password")),
        *((n, False) for n in ("PYTHONPATH", "max_tokens", "tokenizer-path", "KEYBOARD", "")),
    ],
)
def test_names_of_secrets_are_known(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("a\rb\x9b\x7f", r"a\x0db\x9b\x7f"),
        ("\u202eabc\u2028", r"\u202eabc\u2028"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
        ("für 日本語 \u3000\n\tx", "für 日本語 \u3000\n\tx"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=())))
def test_printable_text_can_be_written_and_is_final(text: str) -> None:
    shown = printable(text)
    shown.encode("utf-8")
    assert printable(shown) == shown
    assert "\x1b" not in shown
    assert len(excerpt(text, 20)) <= 23
