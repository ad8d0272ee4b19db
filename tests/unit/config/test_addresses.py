"""Addresses of servers: what a config accepts can be asked, and no error shows a password."""

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qwen3_distill.config import SglangScoring
from qwen3_distill.config.addresses import checked_url


@pytest.mark.parametrize(
    "url",
    [
        *("http://10.0.0.2:30000", "https://teacher.example.org", "http://localhost:1/base/"),
        *("http://[::1]:30000", "http://gpu_7:80", "http://me:p%40w@host:1", "http://host."),
        "http://xn--bcher-kva.example",
    ],
)
def test_addresses_are_accepted(url: str) -> None:
    assert checked_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        *("", "x", "host:30000", "ftp://host", "http://", "http:///a", "http:host", "HTTP//x"),
        *("http://host:99999", "http://host:0", "http://host:-1", "http://host:x", "http://a b"),
        *("http://xn--a", "http://xn--\x80", "http://bücher", "http://a..b", "http://-a"),
        *(f"http://{'a' * 64}", "http://" + "a." * 130 + "b", "http://[::1", "http://[zz]"),
        *("http://host?x", "http://host#x", "http://ho\\st", "http://ho\tst", "http://h\x1b[2J"),
        *("http://[v1.x]:3", "http://[::1]x:3", "http://[::1%25eth0]:3", "http://256.1.1.1:3"),
        *("http://me:s3cret@", "http://a@b@host", "http://:@host", "http://@host"),
    ],
)
def test_what_cannot_be_asked_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="urls: "):
        SglangScoring(kind="sglang", model="m", urls=(url,))


@pytest.mark.parametrize(
    "url",
    ["http://me:s3cret@host:99999", "http://me:s3cret@", "http://me:s3 cret@h", "x://me:s3cret@h"],
)
def test_no_error_shows_a_password(url: str) -> None:
    with pytest.raises(ValidationError) as error:
        SglangScoring(kind="sglang", model="m", urls=(url,))
    assert "s3" not in str(error.value)


def test_a_password_and_a_key_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="drop one"):
        SglangScoring(kind="sglang", model="m", urls=("http://a:b@h",), api_key_file="k")


@settings(max_examples=200)
@given(st.text(st.sampled_from("ahxv-.:/@[]%1925\x00 é0?#\\"), max_size=12))
def test_every_accepted_address_is_one_for_the_http_client(rest: str) -> None:
    try:
        url = checked_url(f"http://{rest}")
    except ValueError:
        return
    request = httpx.Request("POST", f"{url.rstrip('/')}/generate")
    assert request.url.host
    assert request.url.path.endswith("/generate")
