"""What a path may be: the same in every setting and option, and to every library."""

from pathlib import Path

import pytest

from qwen3_distill.environments.make import default_cache
from qwen3_distill.utils.paths import cache_home, plain_path

UNCHANGED = [
    "runs/demo",
    "/a/b",
    "./~",
    "./~/x",
    "a~b",
    "a/~/b",
    "..",
    "Qwen/Qwen3-4B",
    "openai/gsm8k",
    "run:1",
    "a b",
    "10%",
    "cost$",
    "5$ a",
    "C:x",
]


@pytest.mark.parametrize("text", UNCHANGED)
def test_plain_paths_stay_as_they_are(text: str) -> None:
    assert plain_path(text) == text


@pytest.mark.parametrize(
    ("text", "expected"), [("~", "/h"), ("~/x", "/h/x"), ("~root", "/root"), ("~root/x", "/root/x")]
)
def test_home_directory_is_expanded_once(
    text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/h")
    assert plain_path(text) == expected
    monkeypatch.setenv("HOME", "/other")
    assert plain_path(plain_path(expected)) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3://bucket/run", "is a URL.*mount"),
        ("s3:/bucket/run", "is a URL"),
        ("S3://bucket", "is a URL"),
        ("gs://b/x", "is a URL"),
        ("hdfs://b/x", "is a URL"),
        ("https://huggingface.co/x", "is a URL"),
        ("file:///a/b", "is a URL, expected the path in it: /a/b"),
        ("hf://datasets/x", "is a URL.*hub ids"),
        ("${HOME}/x", "has a variable"),
        ("$HOME/x", "has a variable"),
        ("runs/$USER", "has a variable.*'\\$USER'"),
        ("runs/${oc.env:X}", "has a variable"),
        ("runs/$(date)", "has a variable"),
        ("", "expected a path"),
        ("  ", "expected a path"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("runs/demo\n", "control character"),
        ("a\u2028b", "control character"),
        ("x" * 256, "longer than any"),
        ("x/" * 2001, "longer than any"),
        ("~no-such-user/x", "not known.*\\./~no-such-user"),
    ],
)
def test_what_programs_read_differently_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plain_path(text)


def test_home_that_is_no_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "relative")
    with pytest.raises(ValueError, match="not known"):
        plain_path("~/x")


@pytest.mark.parametrize("value", ["", "~/cache", "relative"])
def test_cache_folder_is_never_relative(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_home() == Path("/h/.cache")
    assert default_cache() == Path("/h/.cache/qwen3-distill/environments")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_home() == Path("/c")
    assert default_cache() == Path("/c/qwen3-distill/environments")
